"""Last-block modes of ViTs: one file a family of modes, one table of all.

A mode is a small function of the view of the last block, the token stream (or the history of the forward) and
the guidance: a new mode works with every tower family, and a new family works with every mode.
"""

from clipdense.clip.attention.basic import catseg, plain, value
from clipdense.clip.attention.block import (
    AttentionParameters,
    Block,
    History,
    ParameterRows,
    TokenStream,
    row_parts,
)
from clipdense.clip.attention.calibration import scclip, sfp
from clipdense.clip.attention.correlation import clearclip, correlate, gaussian_window, gem, naclip, sclip
from clipdense.clip.attention.mode import MODES, Mode, dense_mode, get_mode
from clipdense.clip.attention.proxy import proxyclip
from clipdense.clip.attention.radseg import radseg
from clipdense.clip.attention.residual import rcs, resclip

__all__ = [
    "MODES",
    "AttentionParameters",
    "Block",
    "History",
    "Mode",
    "ParameterRows",
    "TokenStream",
    "catseg",
    "clearclip",
    "correlate",
    "dense_mode",
    "gaussian_window",
    "gem",
    "get_mode",
    "naclip",
    "plain",
    "proxyclip",
    "radseg",
    "rcs",
    "resclip",
    "row_parts",
    "sclip",
    "sfp",
    "scclip",
    "value",
]
