"""The WebDataset form of a cache: tars that stream anywhere, with an index for random access.

The form changes how the passes are stored and nothing else: plan, table of samples, tail, codec
tables, commit records and manifest are those of the Zarr form. Every shard of every pass is one
tar, ``passes/0007/000012.tar``, whose samples have an image (if images are embedded), a label
and one *packed view*: all that the Zarr form keeps of the view in its arrays. Beside it is its
*index*, with which a reader gets a block of views with one request and compares it with the digest
of the block.
"""
