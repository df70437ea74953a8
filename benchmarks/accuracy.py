"""Accuracy of every method in one run: SmolLM2-135M, its stress variant and MiniLM, and other tools beside them.

    python -m benchmarks.accuracy                     # 16 windows, about an hour on two cores
    python -m benchmarks.accuracy --device cuda       # a few minutes
    python -m benchmarks.accuracy --windows 2 --only smoothquant

Schemes run in the portable form, node by node in fp32: what `torch.compile` computes, without compiling each of them
(tests compare the two). Calibration sees windows 36 to 131, evaluation the first ones. For language models: the
perplexity ratio to fp32 and the mean KL divergence from its predictions, in thousandths of a nat; for MiniLM: cosine to
the fp32 embeddings, and Spearman's rank correlation of sentence similarities with fp32's. Rows are written as they are
measured; an interrupted run goes on where it stopped.

Other tools quantize the same model in the same process where they are installed, on the CPU (bitsandbytes by its CPU
path), against fp32 there; where one is not installed, or fails, its row says why. Every row names its device.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import int8pass
from benchmarks.cpu import stress
from benchmarks.peers import PEERS
from int8pass import Recipe, hub, measure
from int8pass.calibration import Calibration
from int8pass.calibration.session import Session
from int8pass.recipe_file import written_whole

RESULTS = Path("benchmarks/results/accuracy.json")
CALIBRATION = slice(36, 132)
LENGTH, PAIRS = 512, 256


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One row: a preset or recipe, and how it is calibrated (None: not at all)."""

    name: str
    recipe: Recipe
    columns: int | None = None
    calibrated: bool = True
    blocks: bool = False
    """With outlier blocks in place of columns found per call, as on a GPU."""


def preset(name: str, **fields: Any) -> Recipe:
    """A preset with fields of its scheme changed."""
    return Recipe.preset(name).override(**fields)


def split(name: str, **fields: Any) -> Recipe:
    """A preset with static outlier columns, and fields of its scheme changed."""
    return preset(name, outliers="static", **fields)


SCHEMES = (
    Scheme("smoothquant-o3", preset("smoothquant-o3")),
    Scheme("smoothquant-o3 + 32 columns", split("smoothquant-o3"), 32),
    Scheme("smoothquant-o1", preset("smoothquant-o1")),
    Scheme("auto", preset("auto")),
    Scheme("smoothquant-o2", preset("smoothquant-o2")),
    Scheme("smoothquant-o2 + 32 columns", split("smoothquant-o2"), 32),
    Scheme("smoothquant-o3, weights to nearest", preset("smoothquant-o3", rounding="nearest")),
    Scheme("smoothquant-o2, weights to nearest", preset("smoothquant-o2", rounding="nearest")),
    Scheme("smoothquant-o3 + 32 columns, weights to nearest", split("smoothquant-o3", rounding="nearest"), 32),
    Scheme("smoothquant-o2 + 32 columns, weights to nearest", split("smoothquant-o2", rounding="nearest"), 32),
    Scheme("smoothquant-o2, range of the call alone", preset("smoothquant-o2", clipping="minmax")),
    Scheme("llm.int8", preset("llm.int8"), calibrated=False),
    Scheme("llm.int8, outlier blocks (as on a GPU)", preset("llm.int8"), calibrated=False, blocks=True),
    Scheme("w8a8", preset("w8a8"), calibrated=False),
    Scheme("w8a16", preset("w8a16"), calibrated=False),
    Scheme("smoothquant-o1, gptq", preset("smoothquant-o1", rounding="gptq")),
    Scheme("zeroquant", preset("zeroquant"), calibrated=False),
    Scheme("smoothquant-o1 + 32 columns", split("smoothquant-o1"), 32),
    Scheme("outlier-columns", preset("outlier-columns")),
    Scheme(
        "smoothquant-o1 as published (α 0.5, absmax, symmetric, weights per tensor)",
        preset("smoothquant-o1", alpha=0.5, statistic="absmax", symmetric=True, weights="per_tensor"),
    ),
    Scheme(
        "smoothquant-o3 as published (α 0.5, absmax, symmetric, weights per tensor)",
        preset(
            "smoothquant-o3",
            alpha=0.5,
            statistic="absmax",
            symmetric=True,
            weights="per_tensor",
            clipping="minmax",
            rounding="nearest",
        ),
    ),
    Scheme(
        "w8a8 static, unsmoothed",
        preset("smoothquant-o3", smoothing="none", symmetric=True, clipping="minmax", rounding="nearest"),
    ),
    Scheme("default", preset("default"), calibrated=False),
)
STRESSED = (
    "w8a8", "smoothquant-o1", "smoothquant-o1 + 32 columns", "smoothquant-o2", "smoothquant-o2 + 32 columns",
    "smoothquant-o3", "smoothquant-o3 + 32 columns", "auto", "llm.int8", "outlier-columns", "default",
    "llm.int8, outlier blocks (as on a GPU)",
)  # fmt: skip
ENCODED = (
    "w8a8", "smoothquant-o1", "smoothquant-o2", "smoothquant-o3", "auto", "llm.int8", "outlier-columns", "default",
    "llm.int8, outlier blocks (as on a GPU)",
)  # fmt: skip

SCHEMES_OF = {"smollm2": tuple(s.name for s in SCHEMES), "stress": STRESSED, "minilm": ENCODED}


class Log:
    """The rows of a report, written after each."""

    def __init__(self, path: Path, windows: int, device: torch.device) -> None:
        self.path, self.console = path, Console(stderr=True)
        self._row = {"device": measure.device_name(device), "torch": torch.__version__}
        self.report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
        self.report["environment"] = {
            "transformers": transformers.__version__,
            "int8pass": int8pass.__version__,
            "windows": windows,
            "length": LENGTH,
            "calibration": [CALIBRATION.start, CALIBRATION.stop],
        }

    def has(self, model: str, scheme: str, windows: int) -> bool:
        """True when the row is there already."""
        wanted = {"model": model, "scheme": scheme, "windows": windows}
        return any(wanted.items() <= row.items() for row in self.report["rows"])

    def add(self, **row: Any) -> None:
        """Add a row and write the file whole."""
        self.report["rows"].append({**row, **self._row})
        with written_whole(self.path) as part:
            part.write_text(json.dumps(self.report, indent=1) + "\n")
        self.console.print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


class LanguageModel:
    """Scores forms of one model on windows `[count, LENGTH]`, against its own fp32 predictions."""

    def __init__(self, model: nn.Module, windows: Tensor, count: int) -> None:
        windows = windows.to(next(model.parameters()).device)
        self.model, self.windows = model, windows[:count]
        self.calibration = [{"input_ids": w[None], "use_cache": False} for w in windows[CALIBRATION]]
        self.session = Session(model, Recipe())
        self.losses: list[float] = []
        self.expected: list[Tensor] = []
        with torch.no_grad():
            for window in self.windows:
                logp = self.session.plain(_batch(window)).logits[0].float().log_softmax(-1)
                self.losses.append(F.nll_loss(logp[:-1], window[1:]).item())
                self.expected.append(logp.half())

    def score(self, call: Callable[[dict[str, Any]], Any], progress: measure.Progress) -> dict[str, float]:
        """Ratio of perplexities and mean KL divergence in thousandths of a nat."""
        loss = divergence = 0.0
        with torch.no_grad():
            for done, (window, expected) in enumerate(zip(self.windows, self.expected)):
                progress("evaluate", done, len(self.windows))
                logp = call(_batch(window)).logits[0].float().log_softmax(-1)
                loss += F.nll_loss(logp[:-1], window[1:]).item()
                reference = expected.float()
                divergence += (reference.exp() * (reference - logp)).sum(-1).mean().item()
        progress("evaluate", len(self.windows), len(self.windows))
        count = len(self.windows)
        return {"ratio": math.exp((loss - sum(self.losses)) / count), "kl": 1e3 * divergence / count}


def _batch(window: Tensor) -> dict[str, Any]:
    return {"input_ids": window[None], "use_cache": False}


class SentenceEncoder:
    """Scores forms of an encoder by the similarities of sentence pairs it finds."""

    def __init__(self, model: nn.Module, tokenizer: Any, text: str) -> None:
        self.model = model
        sentences = _sentences(text, 4 * PAIRS)
        used, others = sentences[: 2 * PAIRS], sentences[2 * PAIRS :]

        def batches(of: list[str]) -> list[dict[str, Tensor]]:
            padded = (_padded(tokenizer, of[i : i + 32]) for i in range(0, len(of), 32))
            return [{name: t.to(next(model.parameters()).device) for name, t in batch.items()} for batch in padded]

        self.batches, self.calibration = batches(used), batches(others[:256])
        self.session = Session(model, Recipe())
        with torch.no_grad():
            self.expected = torch.cat([_embed(self.session.plain(b), b) for b in self.batches])

    def score(self, call: Callable[[dict[str, Any]], Any], progress: measure.Progress) -> dict[str, float]:
        """Mean and least cosine to the fp32 embedding, and Spearman's ρ of the pairs' similarities with fp32's."""
        found = []
        with torch.no_grad():
            for done, batch in enumerate(self.batches):
                progress("evaluate", done, len(self.batches))
                found.append(_embed(call(batch), batch))
        progress("evaluate", len(self.batches), len(self.batches))
        embedded = torch.cat(found)
        cosine = F.cosine_similarity(embedded, self.expected)
        similarities = [F.cosine_similarity(e[0::2], e[1::2]) for e in (embedded, self.expected)]
        return {
            "cosine": float(cosine.mean()),
            "least_cosine": float(cosine.min()),
            "spearman": spearman(*similarities),
            "pairs": PAIRS,
        }


def _sentences(text: str, count: int) -> list[str]:
    """Sentences of a text; consecutive ones make pairs that are alike."""
    flat = " ".join(text.split())
    found = [s.strip() for s in flat.split(". ") if 40 <= len(s.strip()) <= 240]
    return found[:count]


def _padded(tokenizer: Any, sentences: list[str]) -> dict[str, Tensor]:
    return dict(tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt"))


def _embed(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean over tokens, padding left out."""
    mask = batch["attention_mask"][..., None].float()
    hidden = output.last_hidden_state.float()
    return (hidden * mask).sum(1) / mask.sum(1)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors without ties."""
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


# -- the run


def run_schemes(log: Log, name: str, subject: Any, windows: int, bars: Bars, only: str) -> None:
    """Every scheme of this model that has no row yet."""
    names = SCHEMES_OF[name]
    chosen = [s for s in SCHEMES if s.name in names and _any(only, s.name) and not log.has(name, s.name, windows)]
    if not chosen:
        return
    seen: Calibration | None = None
    for scheme in bars.over(chosen, f"{name}: schemes"):
        begin = time.perf_counter()
        recipe = scheme.recipe
        if scheme.calibrated:
            seen = seen or Calibration(subject.model, subject.calibration, progress=bars)
            recipe = seen.recipe(recipe, columns=scheme.columns, progress=bars)
        calibrated = time.perf_counter() - begin
        blocks = ("cpu", "cuda") if scheme.blocks else ()
        scores = subject.score(lambda batch, r=recipe, on=blocks: subject.session.quantized(batch, r, on), bars)
        log.add(
            model=name, scheme=scheme.name, windows=windows, **scores, calibration_s=round(calibrated, 1),
            **_summary(recipe),
        )  # fmt: skip


def _any(only: str, name: str) -> bool:
    return any(part in name for part in only.split(","))


def _summary(recipe: Recipe) -> dict[str, Any]:
    """What calibration chose, in a few numbers."""
    alphas: dict[str, int] = {}
    for site in recipe.sites.values():
        alphas[str(site.alpha)] = alphas.get(str(site.alpha), 0) + 1
    columns = sum(len(site.columns) for site in recipe.sites.values())
    return {"alphas": alphas, "columns": columns} if recipe.sites else {}


def run_peers(log: Log, name: str, subject: Any, windows: int, bars: Bars, only: str) -> None:
    """Other tools on a copy of the model."""
    names = [peer for peer in PEERS if _any(only, peer) and not log.has(name, peer, windows)]
    for peer in bars.over(names, f"{name}: other tools"):
        package, build = PEERS[peer]
        try:
            version = importlib.metadata.version(package)
            model = build(copy.deepcopy(subject.model), subject.calibration)
            scores = subject.score(lambda batch, m=model: m(**batch), bars)
        except Exception as failure:  # noqa: BLE001  (someone else's code: whatever it raises is its result)
            last = traceback.extract_tb(failure.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            log.add(
                model=name, scheme=peer, windows=windows, failed=f"{type(failure).__name__}: {failure}"[:300], at=where
            )
            continue
        log.add(model=name, scheme=peer, windows=windows, version=version, **scores)


class Bars:
    """Progress bars; called like a `measure.Progress`."""

    def __init__(self, bars: Progress) -> None:
        self._bars, self._step = bars, bars.add_task("", total=1)

    def __call__(self, title: str, done: int, total: int) -> None:
        self._bars.update(self._step, description=title, completed=done, total=total)

    def over(self, items: Any, title: str) -> Iterator[Any]:
        """The items, counted."""
        task = self._bars.add_task(title, total=len(items))
        for item in items:
            yield item
            self._bars.advance(task)


@contextmanager
def progress_bars(console: Console) -> Iterator[Bars]:
    """Bars on stderr while a run lasts."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        yield Bars(bars)


def table(report: dict[str, Any]) -> Table:
    """The rows as people read them."""
    shown = Table(title="accuracy")
    for column in ("model", "scheme", "ratio", "KL, mnat", "cosine", "Spearman", "device"):
        shown.add_column(column, justify="left" if column in {"model", "scheme", "device"} else "right")
    for row in report["rows"]:
        cells = [
            f"{row[k]:.{d}f}" if k in row else "" for k, d in (("ratio", 4), ("kl", 2), ("cosine", 5), ("spearman", 5))
        ]
        failed = [f"failed: {row['failed'][:60]}"] if "failed" in row else []
        shown.add_row(
            f"{row['model']} ({row['windows']})", row["scheme"], *(failed or cells[:1]), *cells[1:], row["device"]
        )
    return shown


def main() -> None:
    """Run everything that has no row yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--stress-windows", type=int, default=16)
    parser.add_argument("--only", default="", help="schemes whose name contains one of these, with commas")
    parser.add_argument("--models", default="smollm2,stress,minilm", help="some of them")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of our own schemes")
    parser.add_argument("--text", type=Path, help="a file instead of the text that comes with this Python")
    parser.add_argument("--peers", choices=("with", "without", "only"), default="with", help="other tools, on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    text = args.text.read_text() if args.text else hub.evaluation_text()
    with progress_bars(Console(stderr=True)) as bars:
        if args.peers != "only":
            log = Log(args.out, args.windows, args.device)
            run(log, args, text, args.device, bars, run_schemes)
        if args.peers != "without":
            cpu = torch.device("cpu")
            log = Log(args.out, args.windows, cpu)
            run(log, args, text, cpu, bars, run_peers)
    Console().print(table(log.report))


def run(
    log: Log, args: argparse.Namespace, text: str, device: torch.device, bars: Bars, rows: Callable[..., None]
) -> None:
    """`rows` (our schemes, or other tools) of every model asked for."""
    models = args.models.split(",")
    if "smollm2" in models:
        subject = LanguageModel(*_smollm2(text, device), args.windows)
        rows(log, "smollm2", subject, args.windows, bars, args.only)
    if "minilm" in models:
        encoder, tokenizer = hub.load("minilm", dtype=torch.float32, device=device)
        encoding = SentenceEncoder(encoder.requires_grad_(False), tokenizer, text)
        rows(log, "minilm", encoding, 0, bars, args.only)
    if "stress" in models and rows is run_schemes:
        model, windows = _smollm2(text, device)
        stress(model)
        stressed = LanguageModel(model, windows, args.stress_windows)
        rows(log, "stress", stressed, args.stress_windows, bars, args.only)


def _smollm2(text: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    model, tokenizer = hub.load("smollm2", dtype=torch.float32, device=device)
    return model.requires_grad_(False), hub.windows(tokenizer, LENGTH, text)


if __name__ == "__main__":
    main()
