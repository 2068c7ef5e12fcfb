"""The fixed part of the transform: a cosine basis over the token grid, and its radial bands."""

import numpy as np

from scalekd.shapes import FeatureShape

# Up to this many tokens one dense matrix (1.6 MB at most) is faster than two small ones.
_DENSE_TOKENS = 400


def cosine_basis(size: int) -> np.ndarray:
    """Return the orthonormal DCT-II basis, float64 ``(frequency, position)``."""
    frequency, position = np.arange(size)[:, None], np.arange(size)[None]
    basis = np.sqrt(2 / size) * np.cos(np.pi * (position + 0.5) * frequency / size)
    basis[0] /= np.sqrt(2)
    return np.asarray(basis)


def grid_matrices(shape: FeatureShape, bands: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the matrices of the cosine transform over the token grid, for rows sorted by band.

    Args:
        shape: Shape of the features.
        bands: Band of each row; see :func:`radial_bands`.

    Returns:
        Order that sorts the frequencies by band, int64 ``(patch token,)``; and the transform in
        float32: one matrix ``(sorted frequency, patch token)`` for a small grid, otherwise those of
        the two axes of the grid, whose product is to be sorted afterwards.
    """
    order = np.argsort(bands[shape.num_prefix_tokens :], kind="stable")
    rows, columns = (cosine_basis(size).astype(np.float32) for size in shape.grid)
    if shape.num_patch_tokens <= _DENSE_TOKENS:
        return order, [np.kron(rows, columns)[order]]
    return order, [rows, columns]


def radial_bands(shape: FeatureShape, num_bands: int) -> np.ndarray:
    """Return the band of each row of the transformed tokens, int64 ``(token,)``.

    Bands have equal widths in radius, and band 0 contains the lowest frequencies. Prefix tokens are
    the first rows; they form the last band.
    """
    height, width = shape.grid
    squares = np.add.outer(
        (np.arange(height) / height) ** 2, (np.arange(width) / width) ** 2
    ).reshape(-1)
    largest = max(float(squares.max()), 1e-12)
    bands = np.minimum((np.sqrt(squares / largest) * num_bands).astype(np.int64), num_bands - 1)
    # Small grids leave bands empty: renumber the bands in use.
    bands = np.unique(bands, return_inverse=True)[1].reshape(-1)
    prefix = np.full(shape.num_prefix_tokens, bands.max() + 1, np.int64)
    return np.concatenate([prefix, bands])


def forward(tokens: np.ndarray, shape: FeatureShape) -> np.ndarray:
    """Transform patch tokens to frequencies; prefix tokens stay: ``(view, row, channel)``."""
    views, _, channels = tokens.shape
    first = shape.num_prefix_tokens
    rows, columns = (cosine_basis(size).astype(np.float32) for size in shape.grid)
    patches = tokens[:, first:]
    if shape.num_patch_tokens <= _DENSE_TOKENS:
        transformed = np.matmul(np.kron(rows, columns), patches)
    else:
        height, width = shape.grid
        grid = np.matmul(columns, patches.reshape(views * height, width, channels))
        transformed = np.matmul(rows, grid.reshape(views, height, width * channels))
    result = np.empty_like(tokens)
    result[:, :first] = tokens[:, :first]
    result[:, first:] = transformed.reshape(views, -1, channels)
    return result
