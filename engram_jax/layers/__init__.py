"""The layers of a decoder.

They do not depend on data or files. A layer uses the mesh only where the compiler cannot partition
it automatically. Only `engram_with_table` owns a table.
"""
