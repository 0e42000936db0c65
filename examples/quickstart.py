"""Start an engine with the model that comes with Penstock, stream from it, and stop it again.

python examples/quickstart.py
"""

from penstock.clients import launch

with launch("tiny") as client:
    for chunk in client.stream("A list is", max_tokens=60, temperature=0.7, seed=1):
        print(chunk.text, end="", flush=True)
    print()

    answer = client.chat([{"role": "user", "content": "What is a dictionary?"}], max_tokens=60)
    print(answer.text)
    print(answer.usage.generated_tokens, "tokens in", round(answer.usage.total_s, 2), "s")
