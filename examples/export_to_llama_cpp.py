"""Writes a model and its plan as a file that llama.cpp runs, or says which plan it could run.

python export_to_llama_cpp.py MODEL OUT.gguf [PLAN]
"""

import sys

from masformer import MasformerError, export_model, load_model


def main(name: str, out: str, plan: str = "full@11-18; window:512") -> None:
    model, tokenizer = load_model(name, plan=plan)
    try:
        export_model(model, out, "llama.cpp", tokenizer)
    except MasformerError as error:  # with the nearest plan that llama.cpp has a form for
        raise SystemExit(str(error)) from None
    print(f"llama-server -m {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
