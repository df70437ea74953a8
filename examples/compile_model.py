"""A real language model in int8, beside itself in its original dtype. `make demo` runs this.

    python examples/compile_model.py [MODEL] [--inspect] [--windows N] [--tokens N]

MODEL is smollm2 (default), a transformers hub id, a folder, or a .gguf file. The GPU is used when there is one.
`int8pass run MODEL` does the same with more options.
"""

import argparse

import torch
from rich.console import Console

from int8pass import hub, measure
from int8pass.cli import Steps, table


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a language model in its original dtype and in int8.")
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--inspect", action="store_true", help="print the sites and every linear not taken")
    parser.add_argument("--windows", type=int, default=6, help="windows of 512 tokens for perplexity")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of the greedy continuation")
    arguments = parser.parse_args()

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    with Steps() as progress:
        progress(f"load {arguments.model}", 0, 1)
        model, tokenizer = hub.load(arguments.model, dtype=dtype, device=device)
        progress(f"load {arguments.model}", 1, 1)

        # Compiles the model twice, torch.compile(model) and torch.compile(model, backend="int8"), and measures both.
        windows = hub.windows(tokenizer)[: arguments.windows]
        comparison = measure.compare(
            model, tokenizer, windows, name=arguments.model, tokens=arguments.tokens, progress=progress
        )
    Console().print(table(comparison))
    if arguments.inspect:
        print(comparison.report)


if __name__ == "__main__":
    main()
