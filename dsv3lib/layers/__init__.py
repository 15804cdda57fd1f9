"""The parts of a DeepSeek-V3 block, one idea a file.

Shape letters, as they stand at the end of local names (``q_BTHD``) and in the annotations:

====  =========================================================  ============================
B     sequences in a batch
T     tokens of this call; S tokens in the cache after it
N     B x T, tokens regardless of their sequence
D     hidden size                                                paper: d
H     attention heads                                            paper: n_h
C     width of the key-value latent                              paper: d_c (V3: 512)
R     decoupled rotary dimensions                                paper: d_h^R (V3: 64)
K     content dimensions of a head's key                         paper: d_h (V3: 128)
V     dimensions of a head's value
E     routed experts                                             paper: N_r
A     experts active per token                                   paper: K_r
F     width of a feed-forward network's hidden layer
====  =========================================================  ============================
"""
