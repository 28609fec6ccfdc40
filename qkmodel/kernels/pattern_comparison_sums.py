"""What the comparisons of patterns add to."""

import numpy as np

# "No BOS": key column 0 removed and rows renormalised, rows from the third on.
FIRST_NO_BOS_ROW = 2


class RowSums:
    """Sums over the rows of a pattern, in float64.

    `kl` [3, n_heads] and `kl_no_bos` [3] (nats) are of the full, the query-only and the key-only reconstruction;
    `top1_and_error` [2] counts rows whose largest entry is at the same key and sums max |p − p̂|, of the full one.
    """

    def __init__(self, n_heads: int) -> None:
        self.kl: np.ndarray = np.zeros((3, n_heads))
        self.kl_no_bos: np.ndarray = np.zeros(3)
        self.top1_and_error: np.ndarray = np.zeros(2)
