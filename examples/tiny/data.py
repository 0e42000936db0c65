"""From the corpus's files to token arrays: packed rows for the base model, one document a row for the adapters."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from examples.tiny.vocabulary import BOS, EOS, PAD, SPECIAL

IGNORED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True)
class Document:
    """Tokens, and for each whether the model is to learn to write it."""

    kind: str
    tokens: NDArray[np.int32]
    learnt: NDArray[np.bool_]


def load_texts(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return ["".join(text for text, _ in json.loads(line)["parts"]) for line in file]


def load_documents(path: Path, tokenizer: Tokenizer) -> list[Document]:
    """Reads documents and puts each between a beginning and an end.

    A document's parts are encoded one by one: the cut between what a user typed and what follows is then also a cut
    between tokens, as it is when the model answers.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    flat = [text for record in records for text, _ in record["parts"]]
    encoded = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    documents = []
    for record in records:
        tokens, learnt = [SPECIAL.index(BOS)], [False]
        for _, is_learnt in record["parts"]:
            piece = next(encoded).ids
            tokens += piece
            learnt += [is_learnt] * len(piece)
        tokens.append(SPECIAL.index(EOS))
        learnt.append(True)
        documents.append(Document(record["kind"], np.array(tokens, np.int32), np.array(learnt, np.bool_)))
    return documents


def packed_rows(documents: list[Document], order: NDArray[np.int64], context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins the documents in the given order and cuts them into rows: inputs, and the tokens that follow them."""
    stream = np.concatenate([documents[index].tokens for index in order])
    rows = (len(stream) - 1) // context
    if rows == 0:
        raise ValueError(f"{len(stream)} tokens do not fill one row of {context}")
    tokens = torch.from_numpy(stream[: rows * context + 1])
    return tokens[:-1].view(rows, context), tokens[1:].view(rows, context)


def padded_rows(documents: list[Document], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One document a row, cut at *longest* tokens: inputs, and labels for the tokens that are to be learnt."""
    width = min(max(len(document.tokens) for document in documents), longest)
    inputs = np.full((len(documents), width), SPECIAL.index(PAD), np.int64)
    labels = np.full((len(documents), width), IGNORED, np.int64)
    for row, document in enumerate(documents):
        tokens, learnt = document.tokens[:width], document.learnt[:width]
        inputs[row, : len(tokens)] = tokens
        labels[row, : len(tokens) - 1] = np.where(learnt[1:], tokens[1:], IGNORED)
    return torch.from_numpy(inputs), torch.from_numpy(labels)
