"""The tables: layout, plan, lookup, exchange, row optimizer, places of rows, statistics."""
