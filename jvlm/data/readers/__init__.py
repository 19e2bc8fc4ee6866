"""Kinds of data files: each reader gives random access to the records of one file.

A reader is opened by each process when it first reads, and can be pickled. `registry` chooses it by the file's name and
contents; `folder` finds the files of a dataset's folder. To add a kind: a module with a `Reader`, one line in
`registry`.
"""
