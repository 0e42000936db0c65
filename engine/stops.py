"""Stop strings: all of a request's, watched at once, one character after another.

The automaton of Aho and Corasick (1975): a node is the longest end of the text so far that begins a stop string. So its depth is exactly
how much text must be held back, and no character is looked at twice, however long the strings or however often they almost match.
"""

from __future__ import annotations

from collections.abc import Sequence

ROOT = 0
CHARACTER_BITS = 21


class StopStrings:
    """The automaton; it has no state of a stream and is shared by those that have the same stop strings.

    `depths[node]`: characters of the node's text. `ends[node]`: the longest stop string that ends there, empty for none. `first`: the
    characters that leave the root.
    """

    __slots__ = ("_edges", "_fails", "depths", "ends", "first")

    def __init__(self, strings: Sequence[str]) -> None:
        self.first = frozenset(string[0] for string in strings)
        self.depths, self.ends = [0], [""]
        self._edges: dict[int, int] = {}  # node and character → node, as one number
        self._fails = [ROOT]  # the longest proper end of a node's text that is a node too
        children: list[tuple[int, int, str]] = []  # node, its parent, the character between them
        for string in strings:
            node = ROOT
            for character in string:
                child = self._edges.get(node << CHARACTER_BITS | ord(character))
                if child is None:
                    child = len(self.depths)
                    self._edges[node << CHARACTER_BITS | ord(character)] = child
                    self.depths.append(self.depths[node] + 1)
                    self.ends.append("")
                    self._fails.append(ROOT)
                    children.append((child, node, character))
                node = child
            self.ends[node] = string
        children.sort(key=lambda child: self.depths[child[0]])
        for node, parent, character in children:  # shallow nodes first: their own links are needed
            if parent != ROOT:
                self._fails[node] = self.step(self._fails[parent], character)
            self.ends[node] = self.ends[node] or self.ends[self._fails[node]]

    def step(self, node: int, character: str) -> int:
        """The node after one more character. Amortized constant: each link followed gives up a character gained before."""
        code = ord(character)
        while True:
            child = self._edges.get(node << CHARACTER_BITS | code)
            if child is not None:
                return child
            if node == ROOT:
                return ROOT
            node = self._fails[node]
