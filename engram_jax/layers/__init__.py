"""The parts of a decoder, one noun a file.

They know nothing of data or files, and little of meshes: where the compiler cannot split a layer by
itself, the layer does. Only `engram_with_table` owns a table.
"""
