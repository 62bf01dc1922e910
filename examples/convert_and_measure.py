"""Gives a model a plan, measures what is lost by it, and keeps the model.

python convert_and_measure.py MODEL TEXT OUT [PLAN]
"""

import sys

from masformer import compare_plans, load_model, prefix_token, save_model, tokenize
from masformer.data import read_documents


def main(name: str, text: str, out: str, plan: str = "full@11-18; window:512+4", length: int = 2048) -> None:
    model, tokenizer = load_model(name)
    tokens, _ = tokenize(tokenizer, read_documents([text]))
    results = compare_plans(model, tokens, ["full", plan], [length], prefix=prefix_token(tokenizer))
    for result in results:
        print(f"{result.name}: perplexity {result.perplexity:.2f} at {length} tokens")
    # compare_plans leaves the last plan on the model: that is what is kept.
    save_model(model, out, tokenizer)
    print(f"{out}: load it with masformer.load_model, or with AutoModelForCausalLM after `import masformer`")


if __name__ == "__main__":
    main(*sys.argv[1:])
