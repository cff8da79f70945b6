"""The parts of a decoder, one noun a file. They know nothing of data, tables, meshes or files."""
