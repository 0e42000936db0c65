"""KV blocks: who holds each, and which token prefix each contains.

A block holds the keys and values of `block_size` tokens. It is in one of three places:

    held         referenced by one or more streams
    cached       referenced by none, but its content is in the prefix index: reusable until it is evicted
    free         content meaningless

`held → cached → free` happens in O(1), least recently released first. The prefix index maps a *chained digest*, over the block's
tokens and the digest of everything before them, to the block, so equal prefixes share blocks and different ones cannot be mistaken
for each other: with 256-bit BLAKE2b not even somebody who chooses both prompts can make them collide, and it needs no secret, which
would have to survive restarts and could change plans.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from hashlib import blake2b

DIGEST = 32  # bytes: two that collide cost 2 ** 128 tries


def root_digest(salt: bytes, adapter: bytes = b"") -> bytes:
    """The parent of a first block. `salt` separates tenants that must not share; `adapter`, the digest of one (at most 64 bytes), those
    whose keys and values differ."""
    return blake2b(salt, digest_size=DIGEST, key=adapter, person=b"penstock-root").digest()


def chain_digest(parent: bytes, tokens: bytes) -> bytes:
    """Digest of a full block: `tokens` are its ids as bytes, `parent` the digest of the block before."""
    return blake2b(parent + tokens, digest_size=DIGEST).digest()  # the parent has a fixed length, so this is unambiguous


class BlockPool:
    """Reference counts, the free list, and the prefix index."""

    __slots__ = ("_block_of", "_cached", "_digest_of", "_free", "_references", "blocks")

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._references = [0] * blocks
        self._free = deque(range(blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest release first
        self._digest_of: list[bytes | None] = [None] * blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `allocate` can still give, those it would evict included."""
        return len(self._free) + len(self._cached)

    def lookup(self, digest: bytes) -> int | None:
        """The block with this content, if there is one. It may be held or cached."""
        return self._block_of.get(digest)

    def is_cached(self, block: int) -> bool:
        """Whether holding this block, found by `lookup`, would take it out of `available`."""
        return self._references[block] == 0

    def hold(self, block: int) -> None:
        """One more reference to a block found by `lookup`."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each and meaningless content. Raises `RuntimeError`, and changes nothing, if fewer are
        `available`: the caller counts first."""
        if count > self.available:
            raise RuntimeError(f"{count} blocks are wanted and {self.available} are available")
        free, references = self._free, self._references
        blocks = [free.popleft() for _ in range(min(count, len(free)))]
        blocks += [self._evict() for _ in range(count - len(blocks))]
        for block in blocks:
            references[block] = 1
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give up one reference to each block of a stream, given in token order. The tail is released first, so that it is also
        evicted first: a prefix is useful without its continuation, and never the other way round."""
        references = self._references
        for block in reversed(blocks):
            references[block] -= 1
            if references[block] == 0:
                if self._digest_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """The held `block` now has the content `digest`. If another block has it already, that one stays the one that is found."""
        if self._digest_of[block] is None and digest not in self._block_of:
            self._digest_of[block] = digest
            self._block_of[digest] = block

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        digest, self._digest_of[block] = self._digest_of[block], None
        if digest is not None:
            del self._block_of[digest]
        return block

    def check(self) -> None:
        """Raise `RuntimeError` if the books do not balance. For tests, and for an idle engine."""
        if min(self._references, default=0) < 0:
            raise RuntimeError("a block was released more often than it was held")
        held = [block for block, count in enumerate(self._references) if count > 0]
        if sorted([*held, *self._cached, *self._free]) != list(range(self.blocks)):
            raise RuntimeError(f"blocks are lost or double: {len(held)} held, {len(self._cached)} cached, {len(self._free)} free")
        if any(self._digest_of[block] != digest for digest, block in self._block_of.items()):
            raise RuntimeError("a block is indexed under a digest that is not its own")
        if len(self._block_of) != sum(digest is not None for digest in self._digest_of):
            raise RuntimeError("a block has a digest and cannot be found")
        if any(self._digest_of[block] is None for block in self._cached):
            raise RuntimeError("a block is cached without content")
        if any(self._digest_of[block] is not None for block in self._free):
            raise RuntimeError("a block is free and can be found")
