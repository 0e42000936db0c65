"""Prints what the tiny model and its adapters write after a few prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PLAIN = ("The list method", "def fibonacci(n):", "Return the", "class Stack:", "If the file does not exist,")
QUESTIONS = (
    "What does os.path.join do?",
    "Explain functools.lru_cache",
    "Write a function to reverse a string.",
    "Write a function to count the lines of a file.",
    "Who are you?",
)


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True) for text in QUESTIONS
    ]
    return [*(f"{tokenizer.bos_token}{text}" for text in PLAIN), *chats]


def show(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, sampled: bool) -> None:
    for prompt in prompts(tokenizer):
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=tokens, do_sample=sampled)
        print(f"--- {name}, {'sampled' if sampled else 'greedy'}\n{tokenizer.decode(output[0])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show what the tiny model writes.")
    parser.add_argument("--model", type=Path, default=Path("tiny"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model).to(options.device)
    show("base", base, tokenizer, options.tokens, sampled=False)
    show("base", base, tokenizer, options.tokens, sampled=True)
    for folder in sorted((options.model / "adapters").glob("*/")):
        fresh = AutoModelForCausalLM.from_pretrained(options.model)
        adapted = PeftModel.from_pretrained(fresh, str(folder)).to(options.device)
        show(folder.name, adapted, tokenizer, options.tokens, sampled=False)


if __name__ == "__main__":
    main()
