"""Which W8A8 scheme should be the default when there is no calibration data?

Every linear but the head is fake-quantized in fp32 (int32 accumulation is exact, so this is the same arithmetic up to
fp32 rounding) and the model is scored on 512-token windows of the text that ships with Python (`pydoc_data.topics`):
the perplexity ratio to fp32, and the mean KL divergence from the fp32 predictions, which is the steadier of the two.

The *stress* variant is the same function in real arithmetic: 6 random channels of every block norm are multiplied by 40
and the matching weight columns of every reader divided by 40. It imitates the emergent outliers of larger models.

    python benchmarks/data_free_default.py --model FOLDER [--windows 16] --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 512
CALIBRATION = range(100, 104)  # windows; evaluation uses the first ones
TINY = 1e-12
NO_COLUMNS = torch.empty(0, dtype=torch.long)
K32 = "K/32"  # as a number of columns: K / 32, rounded to 8, at least 16, at most 64


@dataclass(frozen=True)
class Scheme:
    """One way to quantize. `columns` and `static` count the channels of a site that stay out of the int8 activation."""

    name: str
    activations: bool = True  # False: int8 weights only
    asymmetric: bool = True
    columns: int | str = 0  # found in every call, multiplied with the dequantized weights; or K32
    rank: str = "absmax"  # how columns are ranked: a key of RANKS
    threshold: float = 0.0  # of the found columns, only those whose absmax exceeds it
    smooth: str = ""  # "", "outliers:T" or "full:ALPHA"; norm-fed sites only
    static: int = 0  # calibrated columns, original weights and activations
    batch: int = 1  # windows per call


@dataclass
class Site:
    """One tensor and all linears that read it."""

    norm: nn.Module | None
    linears: list[nn.Linear] = field(default_factory=list)
    original: list[Tensor] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return self.linears[0].in_features

    def column_norms(self) -> Tensor:
        return sum(w.square().sum(0) for w in self.original).sqrt()

    def rewrite(self, gamma: Tensor, weights: list[Tensor]) -> None:
        self.norm.weight.data, self.original = gamma, weights
        self.install(weights)

    def install(self, weights: list[Tensor]) -> None:
        for linear, weight in zip(self.linears, weights, strict=True):
            linear.weight.data = weight


def find_sites(model: nn.Module, run: Callable[[], object]) -> list[Site]:
    """Groups linears by the identity of the tensor they read; a site is norm-fed if a norm returned it."""
    alive: list[Tensor] = []  # keeps ids unique
    produced: dict[int, nn.Module] = {}
    sites: dict[int, Site] = {}

    def on_linear(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        alive.append(args[0])
        site = sites.setdefault(id(args[0]), Site(produced.get(id(args[0]))))
        site.linears.append(module)
        site.original.append(module.weight.data)

    def on_norm(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        alive.append(output)
        produced[id(output)] = module

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                hooks.enter_context(module.register_forward_pre_hook(on_linear))
            elif "norm" in type(module).__name__.lower():
                hooks.enter_context(module.register_forward_hook(on_norm))
        run()
    return list(sites.values())


@contextmanager
def stressed(sites: list[Site], count: int = 6, factor: float = 40.0, seed: int = 0) -> Iterator[None]:
    """Multiplies `count` random channels of every norm by `factor`, divides the readers' columns: exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    fed = [site for site in sites if site.norm is not None]
    with ExitStack() as undo:
        for site in fed:
            undo.callback(site.rewrite, site.norm.weight.data, site.original)
            scale = torch.ones(site.channels)
            scale[torch.randperm(site.channels, generator=generator)[:count]] = factor
            site.rewrite(site.norm.weight.data * scale, [weight / scale for weight in site.original])
        yield


def quantized_weight(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True).clamp_min(TINY) / 127
    return (weight / scale).round() * scale


def quantized_tokens(x: Tensor, asymmetric: bool) -> Tensor:
    if not asymmetric:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(TINY) / 127
        return (x / scale).round() * scale
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(TINY)
    zero = (-128 - low / scale).round()
    return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


RANKS: dict[str, Callable[[Tensor, Site], Tensor]] = {  # x [tokens, K] -> score [K]
    "absmax": lambda x, _: x.abs().amax(0),
    "absmax*|W|": lambda x, site: x.abs().amax(0) * site.column_norms(),
    "sumsq": lambda x, _: x.square().sum(0),
    "relative": lambda x, _: (x / x.norm(dim=1, keepdim=True).clamp_min(TINY)).pow(4).sum(0),
}


def smoothing(site: Site, rule: str) -> Tensor:
    """s [K]: the norm's gamma is divided by it, the readers' columns are multiplied by it. Uses the parameters only."""
    if not rule or site.norm is None:
        return torch.ones(site.channels)
    kind, number = rule[:4], float(rule.split(":")[1])
    gamma = site.norm.weight.data.abs()
    column = torch.stack([w.abs().amax(0) for w in site.original]).amax(0).clamp_min(TINY)
    if kind == "full":
        s = gamma**number / column ** (1 - number)
        return (s / s.median()).clamp_min(1e-5)
    ratio = gamma / column
    return torch.where(ratio > number * ratio.median(), (ratio / ratio.median()).sqrt(), 1.0)


@contextmanager
def quantized(sites: list[Site], scheme: Scheme, static: list[Tensor]) -> Iterator[None]:
    """The model under `scheme`: weights replaced, inputs fake-quantized once per site; no scale sees kept columns."""
    with ExitStack() as undo:
        for i, site in enumerate(sites):
            s, kept = smoothing(site, scheme.smooth), static[i][: scheme.static] if static else NO_COLUMNS
            weights = [weight * s for weight in site.original]
            rest = [quantized_weight(w.index_fill(1, kept, 0)) for w in weights]
            site.install([r.index_copy(1, kept, w[:, kept]) for r, w in zip(rest, weights, strict=True)])
            undo.callback(site.install, site.original)
            hook = input_hook(site, scheme, s, kept)
            for linear in site.linears:
                undo.enter_context(linear.register_forward_pre_hook(hook))
        yield


def input_hook(site: Site, scheme: Scheme, s: Tensor, kept: Tensor) -> Callable[..., tuple[Tensor]]:
    count = scheme.columns if isinstance(scheme.columns, int) else min(max(round(site.channels / 32 / 8) * 8, 16), 64)
    last: list[Tensor] = []  # input and result: the readers of a site share both

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        if last and last[0] is args[0]:
            return (last[1],)
        x, columns = args[0] / s, kept
        if count:
            flat = x.reshape(-1, site.channels)
            columns = RANKS[scheme.rank](flat, site).topk(count).indices
            columns = columns[flat[:, columns].abs().amax(0) > scheme.threshold]
        if scheme.activations:  # the columns are taken out of the int8 part, so they do not widen the row's range
            inner = quantized_tokens(x.index_fill(-1, columns, 0), scheme.asymmetric)
            x = inner.index_copy(-1, columns, x[..., columns])
        last[:] = [args[0], x]
        return (x,)

    return hook


SMOOTH = "outliers:8"
DEFAULT = Scheme("default: asymmetric + K/32 columns + outlier smoothing", columns=K32, smooth=SMOOTH)
FINALISTS = [  # on all windows; p: plain, s: stress
    (DEFAULT, "ps"),
    (Scheme("int8 weights only", activations=False), "p"),
    (Scheme("calibrated 32 columns", static=32, rank="relative"), "p"),
    *((Scheme(f"calibrated {k} columns by sumsq", static=k, rank="sumsq"), "p") for k in (64, 48)),
    (Scheme("calibrated 64 columns by sumsq, symmetric", static=64, rank="sumsq", asymmetric=False), "p"),
    (Scheme("default, columns by sum of squares", columns=K32, smooth=SMOOTH, rank="sumsq"), "p"),
    (Scheme("default, 4 windows per call", columns=K32, smooth=SMOOTH, batch=4), "p"),
    (Scheme("default without smoothing", columns=K32), "ps"),
]
SCREENED = [  # on the first windows only
    (DEFAULT, "ps"),
    (Scheme("int8 weights only", activations=False), "ps"),
    (Scheme("symmetric", asymmetric=False), "ps"),
    (Scheme("asymmetric"), "ps"),
    (Scheme("LLM.int8(): over 6.0, at most 64, symmetric", asymmetric=False, columns=64, threshold=6.0), "ps"),
    (Scheme("asymmetric + outlier smoothing, no columns", smooth=SMOOTH), "ps"),
    (Scheme("default, symmetric", asymmetric=False, columns=K32, smooth=SMOOTH), "ps"),
    (Scheme("default, 16 columns everywhere", columns=16, smooth=SMOOTH), "ps"),
    (Scheme("default, smoothing threshold 4", columns=K32, smooth="outliers:4"), "ps"),
    # full smoothing undoes the stress exactly, so its stress figure is the plain one
    (Scheme("full smoothing 0.25, asymmetric, K/32 columns", columns=K32, smooth="full:0.25"), "p"),
    (Scheme("full smoothing 0.5, asymmetric, K/32 columns", columns=K32, smooth="full:0.5"), "p"),
    (Scheme("calibrated 16 columns by relative", static=16, rank="relative"), "p"),
    *((Scheme(f"calibrated 32 columns by {rank}", static=32, rank=rank), "p") for rank in RANKS),
]


class Perplexity:
    """Scores the first windows; remembers the fp32 predictions to measure the divergence from them."""

    def __init__(self, model: nn.Module, ids: Tensor, most: int) -> None:
        self.model, self.windows = model, ids[: most * WINDOW].reshape(most, WINDOW)
        self.losses, self.reference = list[float](), list[Tensor]()
        self(most)

    def fp32(self, count: int) -> float:
        return math.exp(sum(self.losses[:count]) / count)

    def __call__(self, count: int, batch: int = 1) -> tuple[float, float]:
        """The perplexity ratio to fp32 and the divergence in nats per token."""
        loss = divergence = 0.0
        for start in range(0, count, batch):
            tokens = self.windows[start : min(start + batch, count)]
            for i, logits in enumerate(self.model(tokens).logits[:, :-1]):
                logp = logits.log_softmax(-1)
                nll = -logp.gather(1, tokens[i, 1:, None]).mean().item()
                if len(self.losses) < len(self.windows):
                    self.losses.append(nll)
                    self.reference.append(logp.half())
                ref = self.reference[start + i].float()
                divergence += (ref.exp() * (ref - logp)).sum(1).mean().item()
                loss += nll
        return math.exp(loss / count) / self.fp32(count), divergence / count


def calibrated_columns(model: nn.Module, sites: list[Site], ids: Tensor, rank: str, most: int) -> list[Tensor]:
    """The `most` best-ranked channels of each site, best first, over the calibration windows."""
    scores = [torch.zeros(site.channels) for site in sites]
    join = torch.maximum if rank.startswith("absmax") else torch.add

    def observe(i: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        scores[i] = join(scores[i], RANKS[rank](args[0].reshape(-1, sites[i].channels), sites[i]))

    with ExitStack() as hooks:
        for i, site in enumerate(sites):
            hooks.enter_context(site.linears[0].register_forward_pre_hook(partial(observe, i)))
        for window in CALIBRATION:
            model(ids[None, window * WINDOW : (window + 1) * WINDOW])
    return [score.topk(most).indices for score in scores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--screen", type=int, default=6, help="windows for the schemes that are only screened")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = "\n\n".join(topics[k] for k in sorted(topics))
    ids = AutoTokenizer.from_pretrained(args.model)(text, return_tensors="pt").input_ids[0]
    sites = find_sites(model, lambda: model(ids[None, :64]))
    columns = cache(partial(calibrated_columns, model, sites, ids, most=64))
    score = Perplexity(model, ids, max(args.windows, args.screen))
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []  # an interrupted study goes on
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    report = dict(model=args.model.name, cpu=cpu[1] if cpu else platform.machine(), python=platform.python_version())
    report |= dict(torch=torch.__version__, transformers=transformers.__version__, window=WINDOW)
    report |= dict(fp32={n: score.fp32(n) for n in (args.windows, args.screen)}, default=asdict(DEFAULT), rows=rows)
    jobs = [(s, args.windows, v == "s") for s, variants in FINALISTS for v in variants]
    jobs += [(s, args.screen, v == "s") for s, variants in SCREENED for v in variants]
    for scheme, count, stress in tqdm(jobs, desc="schemes"):
        key = asdict(scheme) | {"windows": count, "stress": stress}
        if not any(key.items() <= row.items() for row in rows):
            static = columns(scheme.rank) if scheme.static else []
            with stressed(sites) if stress else nullcontext(), quantized(sites, scheme, static):
                ratio, divergence = score(count, scheme.batch)
            rows.append(key | {"ratio": round(ratio, 5), "kl": round(divergence, 6)})
            tqdm.write(f"{scheme.name:50} {stress=!s:5} {count:3} windows  {ratio:.4f}  KL {divergence:.5f}")
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
