"""A shuffle at random access: where one index goes, without a table of all."""

import hashlib

ROUNDS = 6                             # of the Feistel network


def permuted(index: int, size: int, key: str) -> int:
  """Where a permutation of range(size), drawn by the key, takes an index.

  A Feistel network over the next even power of two, walked until it lands inside.
  """
  half = max(1, ((size - 1).bit_length() + 1) // 2)
  mask = (1 << half) - 1
  while True:
    left, right = index >> half, index & mask
    for i in range(ROUNDS):
      drawn = hashlib.blake2b(f'{key} {i} {right}'.encode(), digest_size=8).digest()
      left, right = right, left ^ (int.from_bytes(drawn, 'little') & mask)
    index = left << half | right
    if index < size:
      return index
