"""Trains a small GPT on characters with torch's LayerNorm and with ours: the losses side by side.

The text is the repository's LICENSE. All models start from the same parameters and see the same
batches, a step of each in turn. How far two runs may part says a third model: torch's norms too,
but each parameter moved by one unit in the last place, up or down by chance, before the first step.
"""

import contextlib
import copy
import importlib
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench import command_line
from bench.machine import ROOT, describe
from bench.table import write

MODES = {"cuda": ("float32", "bfloat16", "autocast"), "cpu": ("float32", "bfloat16")}
MODELS = ("torch", "cupynorm", "nudged")
# Losses of about 3 may part by this much whatever the nudged model does: rounding of the dtype.
FLOOR = {"float32": 1e-4, "bfloat16": 2e-2, "autocast": 2e-2}
TIMES_NUDGED = 4.0
LEARNT = 0.85  # the mean loss of the last steps over the first loss, at most
WARM_STEPS = 5  # which compile; not in the times
Rows = list[dict[str, Any]]


class Size(NamedTuple):
    layers: int
    heads: int
    width: int
    context: int
    batch: int
    steps: int
    rate: float


SIZES = {"cuda": Size(4, 4, 256, 128, 32, 60, 1e-3), "cpu": Size(1, 2, 32, 32, 8, 12, 1e-2)}


def gpt(torch: Any, size: Size, characters: int) -> Any:
    """A decoder: embeddings, causal blocks, a last norm."""
    nn, about = torch.nn, {"batch_first": True, "norm_first": True}
    layer = nn.TransformerEncoderLayer(size.width, size.heads, 4 * size.width, 0.0, **about)
    norm, about = nn.LayerNorm(size.width), {"enable_nested_tensor": False}
    made = nn.ModuleDict({"blocks": nn.TransformerEncoder(layer, size.layers, norm, **about)})
    for name, length in (("token", characters), ("place", size.context)):
        made[name] = nn.Embedding(length, size.width)
        nn.init.normal_(made[name].weight, std=0.02)
    return made


def logits(torch: Any, model: Any, tokens: Any) -> Any:
    """Of the next characters; the embedding again is the head."""
    h = model["token"](tokens) + model["place"].weight
    make = torch.nn.Transformer.generate_square_subsequent_mask
    h = model["blocks"](h, make(len(h[0]), device=h.device, dtype=h.dtype), is_causal=True)
    return (h @ model["token"].weight.T.to(h.dtype)).float().flatten(0, 1)


def models(torch: Any, size: Size, characters: int, mode: str, device: str) -> dict[str, Any]:
    """Three models with the same parameters, but for the last bits of the third's."""
    import cupynorm.torch

    torch.manual_seed(1)
    model = gpt(torch, size, characters).to(device)
    model = model.to(torch.bfloat16) if mode == "bfloat16" else model
    ours = cupynorm.torch.convert(copy.deepcopy(model))
    if any(type(m) is torch.nn.LayerNorm for m in ours.modules()):
        msg = "convert left some of torch's norms in the model"
        raise RuntimeError(msg)
    nudged = copy.deepcopy(model)
    with torch.no_grad():
        for p in nudged.parameters():
            ulp = torch.finfo(p.dtype).eps * p.abs()
            p += ulp * (2 * torch.randint(0, 2, p.shape, device=device) - 1)
    return dict(zip(MODELS, (model, ours, nudged), strict=True))


def run_mode(torch: Any, size: Size, mode: str, device: str, deadline: float) -> Rows:
    """Train the models a step in turn, starting with another one each time; a row per step."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    alphabet, draw = sorted(set(text)), torch.Generator().manual_seed(2)
    data, last = torch.tensor([alphabet.index(c) for c in text]), len(text) - size.context - 1
    made = models(torch, size, len(alphabet), mode, device)
    optimizers = {n: torch.optim.AdamW(m.parameters(), lr=size.rate) for n, m in made.items()}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    half, rows = mode == "autocast", []
    for number in range(size.steps):
        if time.monotonic() > deadline:
            break
        begins, row = torch.randint(0, last, (size.batch,), generator=draw), {}
        window = torch.stack([data[b : b + size.context + 1] for b in begins]).to(device)
        for name in MODELS[number % 3 :] + MODELS[: number % 3]:
            wait()
            begin = time.perf_counter()
            with torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext():
                scores = logits(torch, made[name], window[:, :-1])
            loss = torch.nn.functional.cross_entropy(scores, window[:, 1:].flatten())
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            wait()
            row[f"ms_{name}"] = 1e3 * (time.perf_counter() - begin)
            row[f"loss_{name}"] = loss.item()
        order = (f"{what}_{name}" for what in ("loss", "ms") for name in MODELS)
        rows.append({"mode": mode, "step": number} | {name: row[name] for name in order})
    return rows


def verdict(rows: Rows) -> tuple[bool, str]:
    """Whether ours parts from torch's no more than rounding explains, and both have learnt."""
    losses = {m: [r[f"loss_{m}"] for r in rows] for m in MODELS}
    ours, nudged = (
        max(abs(a - b) for a, b in zip(losses[m], losses["torch"], strict=True)) for m in MODELS[1:]
    )
    tail = max(1, len(rows) // 8)
    learnt = [statistics.fmean(values[-tail:]) / values[0] for values in losses.values()]
    finite = all(abs(v) < math.inf for values in losses.values() for v in values)
    allowed = max(FLOOR[rows[0]["mode"]], TIMES_NUDGED * nudged)
    warm = rows[WARM_STEPS:] or rows
    ms = [statistics.median(r[f"ms_{m}"] for r in warm) for m in MODELS[:2]]
    return finite and ours <= allowed and max(learnt) <= LEARNT, (
        f"{rows[0]['mode']}: loss {losses['torch'][0]:.3f} to {losses['torch'][-1]:.3f} in "
        f"{len(rows)} steps, ours apart by {ours:.2g} at most, the nudged by {nudged:.2g}; ms per "
        f"step {ms[0]:.2f} with torch's norms, {ms[1]:.2f} with ours"
    )


def train(
    folder: Path, size: Size, device: str, machine: Any, modes: Any = (), deadline: float = math.inf
) -> tuple[str, str]:
    """Run the modes, all by default, write training.csv after each; ok if all of them are."""
    import torch

    good, said, rows = True, [], []
    for mode in modes or MODES[device]:
        made = run_mode(torch, size, mode, device, deadline)
        if len(made) < size.steps:
            said.append(f"{mode}: left out at the deadline")
            continue
        right, sentence = verdict(made)
        good, rows, said = good and right, rows + made, [*said, sentence]
        write([row | machine for row in rows], folder / "training.csv")
    return ("skipped" if not rows else "ok" if good else "failed"), "; ".join(said)


def step(folder: Path, run: Any, machine: dict[str, str]) -> tuple[str, str]:
    """The step of `bench.gpu`; a simulated run trains on the CPU, whose times say nothing."""
    try:
        import torch
    except ImportError:
        return "skipped", "torch is not installed"
    if not run.simulated and not torch.cuda.is_available():
        return "skipped", "torch sees no CUDA device"
    device, modes = ("cpu", ("float32",)) if run.simulated else ("cuda", ())
    return train(folder, SIZES[device], device, machine, modes=modes, deadline=run.deadline)


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if the losses part or do not fall."""
    parser = command_line("training", __doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    given = parser.parse_args(argv)
    machine = describe()
    if given.device == "cuda":
        machine["gpu"] = importlib.import_module("torch").cuda.get_device_name()
    status, sentence = train(given.out, SIZES[given.device], given.device, machine)
    print(f"{status}: {sentence}")
    return int(status == "failed")


if __name__ == "__main__":
    sys.exit(main())
