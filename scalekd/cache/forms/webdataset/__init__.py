"""The WebDataset form of a cache: tars that can be streamed, with an index for random access.

Only the passes differ from the Zarr form; plan, table of samples, tail, codec tables, commit
records and manifest are the same. Every shard of every pass is one tar, such as
``passes/0007/000012.tar``. Each of its samples has an image (if images are embedded), a label and
one *packed view*: all values that the Zarr form stores in the arrays of the pass. The tar's *index*
lets a reader fetch a block of views with one request and compare it with the digest of the block.
"""
