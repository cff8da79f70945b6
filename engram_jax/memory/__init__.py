"""Everything about the tables: layout, plan, lookup, row optimizer, placements."""
