"""Formats of records: one file each, which recognises a record and converts it to the ms-swift format or a document.

`detection` decides on the format of a source. To add a format: a module with a `Format`, and its place in
`detection.FORMATS`.
"""
