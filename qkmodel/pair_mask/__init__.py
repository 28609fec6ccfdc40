"""Step 2: which query-feature × key-feature pairs each head of a layer needs.

The score of (i, j) in head h is a sum over pairs of active features,
`f_q[i,a] · f_k[j,b] · (R_i d_a)·(R_j e_b) · scale`, plus terms in which a decoder's bias stands on either side. A pair
mask multiplies the pair terms, per head.
"""
