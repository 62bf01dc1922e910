"""Finds the KV heads that must see far on your text, and writes the plan.

python search_by_head.py MODEL TEXT PLAN.yaml [SHARE]
"""

import sys

from masformer import load_model, search
from masformer.data import read_documents


def main(
    name: str,
    text: str,
    out: str,
    budget: str = "25%",
    local: str = "window:256+4",
    length: int = 2048,
    criteria: str = "tail,retrieval",
) -> None:
    model, tokenizer = load_model(name)
    texts = [document.text for document in read_documents([text])]
    options = {"criteria": criteria, "length": length, "windows": 4, "held_out_windows": 4}
    found = search(model, tokenizer, texts, budget, local, by="heads", **options)
    print(f"found: {found.plan}")
    for score in found.placements["held-out"]:  # the plan, beside others of the same cost, on text not chosen by
        print(f"{score.name}: {score.tail_nll:.3f} nats")
    found.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
