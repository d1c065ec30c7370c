"""Limits on untrusted input, all in one place: what exceeds one of them is refused by name.

None is near anything that has been published.  `runtime/format.py` has those that a canonical checkpoint must keep as well.
"""

from __future__ import annotations

from runtime.format import MAX_EXPERTS as MAX_EXPERTS
from runtime.format import MAX_HEADER_BYTES as MAX_HEADER_BYTES
from runtime.format import MAX_JSON_BYTES as MAX_JSON_BYTES
from runtime.format import MAX_LAYERS as MAX_LAYERS
from runtime.format import MAX_NUMBER as MAX_NUMBER

MAX_METADATA_BYTES = 1_000_000  # of its `__metadata__`
MAX_NAME_LENGTH = 4096  # characters of a tensor's name
MAX_TENSORS = 2_000_000  # of a checkpoint; the largest published ones have 300,000
MAX_NESTING = 64  # brackets inside brackets in a config or index
MAX_FILE_NAME = 255  # bytes of a file's name; what file systems take
MAX_REMOTE_FILES = 100_000  # of a listing of a remote checkpoint
MAX_SIDE_DEPTH = 4  # folders below the checkpoint that are searched for side files
MAX_GROUPS = 1000  # groups of a quantisation config whose modules are told by patterns; published ones have a few
MAX_PATTERN = 100_000  # characters of a regular expression or shell wildcard of a config
MAX_REGEX_S = 1.0  # CPU time of one such pattern, over all modules
MAX_REGEXES_S = 5.0  # CPU time of all of them
