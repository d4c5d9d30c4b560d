"""Error messages as the library words them now.

Results that were measured earlier contain earlier wordings of the same messages. Tables show the
current ones, so that a reader finds on the page what the library prints.
"""

from __future__ import annotations

import re

CURRENT = (
    (
        r"stay; ('\w+') with these options cannot be honoured there\. What can: dropped tokens "
        r"skip the MLP only, with token_drop and score='norm', 'random' or 'learned' \(and a fixed "
        r"keep\), or an",
        r"stay, which \1 with these options does not allow. Use token_drop with score='norm', "
        r"'random' or 'learned' and a fixed keep (dropped tokens skip only the MLP), add "
        r"skip='window' (complete windows skip blocks), or use an",
    ),
    (r"has no MLP branch of its own", "has no separate MLP branch"),
    (
        r"no module of it calls scaled dot product attention \(or writes it out\) in a way that "
        r"can be served",
        "none of its modules computes scaled dot product attention in a way that is supported",
    ),
    (r"in the image, and those of site", "in the image, but those of site"),
    (r"may be no patches", "may not be patches"),
    (r"are in no raster order", "are not in raster order"),
    (r"patches in no raster order", "patches not in raster order"),
    (r"say what they are: patch", "pass the layout, patch"),
    (r"that needs no places", "that needs no positions"),
    (
        r"tokens, and where in the image they are is not known (\(.*\)) when it was patched\): "
        r"('\w+') needs that; use an (.*) like this one",
        r"tokens, whose positions in the image are not known \1 at patch time), but \2 needs "
        r"positions: use an \3 of this size",
    ),
    (
        r"lays the images of a batch end to end in one sequence, where tokens of one would be "
        r"chosen at the cost of another",
        "packs the images of a batch into one sequence, where images would compete for the tokens "
        "to keep",
    ),
    (
        r": tokens behind the patches need one sequence for all blocks",
        " has special tokens after the patches, which token strategies support only if one "
        "sequence runs through all blocks",
    ),
    (
        r"cannot make sequences shorter that have special tokens",
        "cannot shorten sequences with special tokens",
    ),
    (
        r"hands tokens from block to block in another form than \[B, N, C\], which token "
        r"strategies cannot make shorter",
        "passes tokens between blocks in a form other than [B, N, C], which token strategies "
        "cannot shorten",
    ),
    (r"which is no part of", "which is not part of"),
    (r"input=: it must be the shape", "input=, which must be the shape"),
    (r"softmax of no product of q and k", "softmax that is not over a product of q and k"),
    (
        r"keeps another number of tokens for every image, and an exported program has shapes that "
        r"values cannot change: use a fixed budget instead",
        "keeps a different number of tokens for every image, but the shapes in an exported program "
        "cannot depend on values: use a fixed budget",
    ),
)


def reworded(message: str) -> str:
    """A message in its current wording.

    >>> reworded("those may be no patches")
    'those may not be patches'
    """
    for earlier, now in CURRENT:
        message = re.sub(earlier, now, message)
    return message
