"""Projectors from a student's feature map to tokens on the teacher's grid and of its width.

`CrossAttentionProjector` (ScaleKD's CAP) attends to the student's map with one query per teacher
token. The grids of student and teacher are independent, so any student fits any teacher.
`ConvProjector` is the baseline of the method: the same stem, no attention.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scalekd.errors import UsageError

Grid = tuple[int, int]
"""Rows and columns."""

_POSITION_STD = 0.02  # as in the published code, whose truncation at +-2 has no effect
# As in most published pairs; the teachers' heads differ by a factor of two at most.
_HEAD_WIDTH = 64
_PUBLISHED_FFN_RATIO = 4


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of a ``(batch, channel, row, column)`` map."""

    def forward(
        self, x: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "batch channel row column"]:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS: dict[str, type[nn.BatchNorm2d] | type[ChannelLayerNorm]] = {
    "batch": nn.BatchNorm2d,
    "layer": ChannelLayerNorm,
}
"""Norms of the projectors' stem: batch norm as published for most students, channel layer norm
for students without batch norm."""


class _Stem(nn.Module):
    """3 x 3 convolution, norm and ReLU on the student's own grid."""

    def __init__(
        self, num_channels: int, grid: Grid, norm: str, *, depthwise: bool = False
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise UsageError(f"unknown projector norm {norm!r}; known are {', '.join(NORMS)}")
        self.expected = (num_channels, *grid)
        self.conv = nn.Conv2d(
            num_channels,
            num_channels,
            kernel_size=3,
            padding=1,
            groups=num_channels if depthwise else 1,
        )
        self.norm = NORMS[norm](num_channels, eps=1e-5)

    def forward(
        self, x: Float[Tensor, "batch channel row column"]
    ) -> Float[Tensor, "batch channel row column"]:
        if x.shape[1:] != self.expected:
            channels, rows, columns = self.expected
            raise ValueError(
                f"the projector was built for student maps of {channels} channels on a "
                f"{rows} x {columns} grid and got {tuple(x.shape) = }; build the objective for "
                "the student's levels at this image size"
            )
        return F.relu(self.norm(self.conv(x)))


class CrossAttentionProjector(nn.Module):
    """Attends from teacher-side queries to the student's map (ScaleKD's CAP).

    The student's map passes a 3 x 3 convolution, norm and ReLU, gets a learned position added,
    and serves as keys and values. The queries, learned or given, pass a linear layer and ReLU.
    Then: multi-head attention, layer norm, a ReLU MLP with a residual from the normed tokens.
    There is no residual from the queries, and no final norm, as in the published code. Unlike in
    the published code, keys have no bias: it would add the same number to all scores of a query,
    which softmax ignores, so that it would only follow the rounding noise of its gradient.

    Args:
        student_channels: Channels of the student's map.
        student_grid: Rows and columns of the student's map.
        teacher_channels: Width of queries and outputs.
        query_grid: Rows and columns of the teacher's grid, with one query per position.
        num_heads: Attention heads; must divide ``teacher_channels``.
        softmax_scale: Multiplies the attention scores beside ``head_width ** -0.5``: above 1
            attention is sharper. The published pairs use 5, 1 and 0.2.
        norm: ``"batch"`` or ``"layer"``, the stem's norm.
        depthwise_stem: Whether the stem's convolution is depthwise; keys and values mix channels.
        ffn_ratio: Width of the MLP divided by ``teacher_channels``.
        learned_query: Whether the queries are parameters of the projector. Otherwise they are
            passed to ``forward``.

    Raises:
        UsageError: ``num_heads`` does not divide ``teacher_channels``, or ``norm`` is unknown.
    """

    def __init__(
        self,
        *,
        student_channels: int,
        student_grid: Grid,
        teacher_channels: int,
        query_grid: Grid,
        num_heads: int,
        softmax_scale: float = 1.0,
        norm: str = "batch",
        depthwise_stem: bool = False,
        ffn_ratio: int = _PUBLISHED_FFN_RATIO,
        learned_query: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or teacher_channels % num_heads:
            raise UsageError(
                f"a projector of width {teacher_channels} cannot have {num_heads} attention "
                f"heads; the divisors of {teacher_channels} are "
                f"{', '.join(map(str, divisors(teacher_channels)))}"
            )
        self.query_grid = query_grid
        self.num_heads = num_heads
        self.scale = softmax_scale * (teacher_channels // num_heads) ** -0.5
        num_queries = query_grid[0] * query_grid[1]

        self.stem = _Stem(student_channels, student_grid, norm, depthwise=depthwise_stem)
        self.pos_embed = nn.Parameter(torch.empty(1, student_channels, *student_grid))
        self.query_embed = (
            nn.Parameter(torch.empty(num_queries, teacher_channels)) if learned_query else None
        )
        self.query_proj = nn.Linear(teacher_channels, teacher_channels)
        self.q = nn.Linear(teacher_channels, teacher_channels)
        self.k = nn.Linear(student_channels, teacher_channels, bias=False)
        self.v = nn.Linear(student_channels, teacher_channels)
        self.out = nn.Linear(teacher_channels, teacher_channels)
        self.norm = nn.LayerNorm(teacher_channels, eps=1e-5)
        self.fc1 = nn.Linear(teacher_channels, ffn_ratio * teacher_channels)
        self.fc2 = nn.Linear(ffn_ratio * teacher_channels, teacher_channels)

        nn.init.normal_(self.pos_embed, std=_POSITION_STD)
        if self.query_embed is not None:
            nn.init.normal_(self.query_embed)
        # The published query layer is a 1 x 1 convolution; its default initialisation has the
        # same bound as a linear layer's. Everything else keeps PyTorch's defaults as well.

    def forward(
        self,
        x: Float[Tensor, "batch student_channel row column"],
        query: Float[Tensor, "batch token channel"] | None = None,
    ) -> Float[Tensor, "batch token channel"]:
        """Project a student's map onto the query grid.

        Args:
            x: The student's map.
            query: Queries, row by row of the query grid; required if the projector does not learn
                them, and refused otherwise.

        Returns:
            Tokens of the teacher's width, row by row of the query grid.

        Raises:
            ValueError: The map or the queries have another shape than the projector was built
                for, or the queries are missing or not allowed.
        """
        keys = (self.stem(x) + self.pos_embed).flatten(2).transpose(1, 2)
        batch = x.shape[0]
        attended = F.scaled_dot_product_attention(
            # Learned queries are the same for the whole batch: projected once, then repeated;
            # not every fused kernel takes a stride of 0.
            self._split_heads(
                self.q(F.relu(self.query_proj(self._queries(query)))), batch
            ).contiguous(),
            self._split_heads(self.k(keys), batch),
            self._split_heads(self.v(keys), batch),
            scale=self.scale,
        )
        tokens = self.norm(self.out(attended.transpose(1, 2).flatten(2)))
        projected: Tensor = tokens + self.fc2(F.relu(self.fc1(tokens)))
        return projected

    def no_weight_decay(self) -> set[str]:
        """Return the names of the position embeddings, which recipes exclude from weight decay."""
        return {"pos_embed"}

    def _queries(self, query: Tensor | None) -> Tensor:
        if self.query_embed is not None:
            if query is not None:
                raise ValueError(
                    "this projector learns its queries; build it with "
                    "learned_query=False to pass them"
                )
            return self.query_embed[None]
        rows, columns = self.query_grid
        expected = (rows * columns, self.q.in_features)
        if query is None or query.shape[1:] != expected:
            shape = "none" if query is None else f"{tuple(query.shape)}"
            raise ValueError(
                f"the projector takes queries of shape (batch, {expected[0]}, {expected[1]}), one "
                f"per position of its {rows} x {columns} query grid, but got {shape}"
            )
        return query

    def _split_heads(self, tokens: Tensor, batch: int) -> Tensor:
        heads = tokens.reshape(*tokens.shape[:2], self.num_heads, -1).transpose(1, 2)
        return heads.expand(batch, -1, -1, -1)


class ConvProjector(nn.Module):
    """Projector without attention: stem, linear layer, average over cells of the teacher's grid.

    A position of the teacher's grid is the average of the student's positions that it covers, or
    the nearest one if the student's grid is coarser.

    Args:
        student_channels: Channels of the student's map.
        student_grid: Rows and columns of the student's map.
        teacher_channels: Width of the outputs.
        query_grid: Rows and columns of the teacher's grid.
        norm: ``"batch"`` or ``"layer"``, the stem's norm.
        depthwise_stem: Whether the stem's convolution is depthwise.

    Raises:
        UsageError: ``norm`` is unknown.
    """

    def __init__(
        self,
        *,
        student_channels: int,
        student_grid: Grid,
        teacher_channels: int,
        query_grid: Grid,
        norm: str = "batch",
        depthwise_stem: bool = False,
    ) -> None:
        super().__init__()
        self.query_grid = query_grid
        self.stem = _Stem(student_channels, student_grid, norm, depthwise=depthwise_stem)
        self.proj = nn.Conv2d(student_channels, teacher_channels, kernel_size=1)

    def forward(
        self, x: Float[Tensor, "batch student_channel row column"]
    ) -> Float[Tensor, "batch token channel"]:
        """Project a student's map onto the query grid.

        Raises:
            ValueError: The map has another shape than the projector was built for.
        """
        resized = F.adaptive_avg_pool2d(self.proj(self.stem(x)), self.query_grid)
        return resized.flatten(2).transpose(1, 2)


def divisors(number: int) -> list[int]:
    """Return all positive divisors of a number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def default_num_heads(width: int) -> int:
    """Return the head count whose heads are nearest to 64 wide, the larger one of two."""
    return min(divisors(width), key=lambda heads: (abs(width / heads - _HEAD_WIDTH), -heads))
