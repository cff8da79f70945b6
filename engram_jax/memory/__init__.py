"""The tables: plan, places and layout of rows, lookup, exchange, row optimizer."""
