"""Complete a file of prompts, with a bounded number at once; run it again after an interruption, and it carries on.

    python examples/jsonl_batch.py prompts.jsonl results.jsonl

A line of the input is a text, or a map with a `prompt` and parameters of its own.
"""

import sys
from pathlib import Path

from penstock.clients import launch
from penstock.clients.jsonl import Output, read_rows, result_row

source, target = Path(sys.argv[1]), Path(sys.argv[2])

with launch("tiny") as client, Output(target) as results, source.open("rb") as lines:
    rows = [row for row in read_rows(lines, results.done) if row.error is None]
    prompts = (row.arguments for row in rows)
    for outcome in client.map(prompts, concurrency=16, ordered=False, max_tokens=30):
        results.write(result_row(rows[outcome.index].id, outcome, ids=False))
    print(f"{len(rows)} done now, {len(results.done)} before")
