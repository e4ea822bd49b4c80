"""Train a small network on handwritten digits, with cupynorm's LayerNorm between its two layers.

No framework: NumPy on the CPU or CuPy on a GPU, and every gradient is written out. The same network
is trained with and without the norm, and the trained norm is handed to torch at the end, if torch
is there. It takes a few seconds and downloads nothing:

    pip install cupynorm scikit-learn                 # tqdm draws a progress bar, if installed
    python examples/train_digits.py
    python examples/train_digits.py --device cuda     # and: pip install 'cupy-cuda12x[ctk]'

The network, for rows of 64 gray values:

    h = x @ w1 + b1        64 -> 128
    n = norm(h)            the layer norm; without it n = h
    r = max(n, 0)
    logits = r @ w2 + b2   128 -> 10 digits
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

import cupynorm as cn

PIXELS, HIDDEN, CLASSES = 64, 128, 10


def main(arguments=None):
    """Train twice, print both results, and compare the trained norm with torch's."""
    options = read_options(arguments)
    device = pick_device() if options.device == "auto" else options.device
    xp = array_library(device)
    train_set, test_set = digits(xp, options.seed)
    print(f"{len(train_set[0])} digits to train on, {len(test_set[0])} to test, on {device}")

    plain = Network(xp, options.seed, norm=None)
    report("without layer norm", plain, train_set, test_set, options)
    norm = cn.LayerNorm(HIDDEN, device=device)
    network = Network(xp, options.seed, norm)  # the same start for both
    report("with layer norm", network, train_set, test_set, options)

    if options.save:
        norm.save(options.save)
        print(f"norm saved to {options.save}")
    print(compare_with_torch(norm, network.first_layer(test_set[0])))


# --- the network --------------------------------------------------------------------------------


class Network:
    """Two dense layers with a norm between them, or None; `p` holds the dense parameters."""

    def __init__(self, xp, seed, norm):
        self.xp, self.norm = xp, norm
        rng = np.random.default_rng(seed)  # on the host: a GPU starts from the same numbers
        # The deviation sqrt(2 / inputs) keeps the size of what passes a ReLU (He et al., 2015).
        shapes = {"w1": (PIXELS, HIDDEN), "w2": (HIDDEN, CLASSES)}
        start = {name: rng.normal(0, (2 / s[0]) ** 0.5, s) for name, s in shapes.items()}
        start |= {"b1": np.zeros(HIDDEN), "b2": np.zeros(CLASSES)}
        self.p = {name: xp.asarray(values.astype(np.float32)) for name, values in start.items()}

    def first_layer(self, x):
        """Rows of 64 gray values to rows of 128 numbers."""
        return x @ self.p["w1"] + self.p["b1"]

    def forward(self, x, keep=True):
        """Rows of gray values to logits; with `keep`, hold what `backward` needs."""
        n = h = self.first_layer(x)
        if self.norm is not None:
            n = self.norm(h, keep=keep)  # the norm holds its own part
        r = self.xp.maximum(n, 0)
        self.kept = (x, r) if keep else None
        return r @ self.p["w2"] + self.p["b2"]

    def backward(self, dlogits):
        """Gradient of every parameter, by the names of `parameters`."""
        x, r = self.kept
        dh = dn = (dlogits @ self.p["w2"].T) * (r > 0)  # ReLU: 0 where the value was cut off
        gradients = {"w2": r.T @ dlogits, "b2": dlogits.sum(axis=0)}
        if self.norm is not None:
            self.norm.zero_grad()  # or backward would add to the gradients of the last batch
            dh = self.norm.backward(dn)
            gradients |= {f"norm.{name}": g for name, g in self.norm.grad.items()}
        return gradients | {"w1": x.T @ dh, "b1": dh.sum(axis=0)}

    def parameters(self):
        """All arrays that training changes; the norm's are arrays like the others."""
        return self.p | ({} if self.norm is None else self.norm.state_dict("norm."))


# --- training -----------------------------------------------------------------------------------


def cross_entropy(xp, logits, labels):
    """Mean of -log(probability of the right digit), and its gradient with respect to logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)  # exp() of a large logit is infinite
    log_p = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    loss = -(labels * log_p).sum() / len(labels)
    return loss, (xp.exp(log_p) - labels) / len(labels)


def step(network, velocity, x, labels, options):
    """One batch: forward, loss, backward, then SGD with momentum."""
    logits = network.forward(x)
    _, dlogits = cross_entropy(network.xp, logits, labels)
    gradients = network.backward(dlogits)
    for name, array in network.parameters().items():
        velocity[name] *= options.momentum
        velocity[name] += gradients[name]
        array -= options.rate * velocity[name]  # in place, so that the norm has the new values


def train(name, network, train_set, options):
    """Run through the training set `epochs` times, in a new order each time."""
    x, labels = train_set
    xp = network.xp
    velocity = {key: xp.zeros_like(array) for key, array in network.parameters().items()}
    rng = np.random.default_rng(options.seed + 1)
    for _ in progress(name, options.epochs):
        order = xp.asarray(rng.permutation(len(x)))
        for start in range(0, len(x), options.batch):
            rows = order[start : start + options.batch]
            step(network, velocity, x[rows], labels[rows], options)


def measure(network, data):
    """Loss, and share of the digits whose largest logit is the right one, over a whole set."""
    x, labels = data
    logits = network.forward(x, keep=False)  # nothing goes back from here
    loss, _ = cross_entropy(network.xp, logits, labels)
    right = (logits.argmax(axis=1) == labels.argmax(axis=1)).mean()
    return float(loss), float(right)


def report(name, network, train_set, test_set, options):
    """Train, and print what that did."""
    before, _ = measure(network, train_set)
    train(name, network, train_set, options)
    after, _ = measure(network, train_set)
    _, right = measure(network, test_set)
    print(f"{name}: train loss {before:.4f} -> {after:.4f}, test accuracy {right:.4f}")


# --- around it ----------------------------------------------------------------------------------


def read_options(arguments):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="digits per step (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate (%(default)s)")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="PATH", help=".safetensors or .npz for the trained norm")
    return parser.parse_args(arguments)


def pick_device():
    """Take the GPU if CuPy can multiply matrices on it, which needs more than a bare CuPy."""
    try:
        import cupy

        _ = cupy.ones((2, 2)) @ cupy.ones((2, 2))
    except Exception:  # no CuPy, no driver, no GPU, no cuBLAS
        return "cpu"
    return "cuda"


def array_library(device):
    """NumPy or CuPy: the code above is the same for both."""
    if device == "cpu":
        return np
    import cupy

    return cupy


def digits(xp, seed):
    """Images as rows of 64 numbers, and one-hot labels: four fifths to train on, one to test."""
    bunch = load_digits()
    images = (bunch.data / 16).astype(np.float32)  # gray values go from 0 to 16
    labels = np.eye(CLASSES, dtype=np.float32)[bunch.target]
    order = np.random.default_rng(seed).permutation(len(images))  # the file goes writer by writer
    cut = len(images) * 4 // 5
    return [(xp.asarray(images[p]), xp.asarray(labels[p])) for p in (order[:cut], order[cut:])]


def progress(name, epochs):
    """Count epochs: behind a bar where tqdm is installed, with a line now and then where not."""
    try:
        from tqdm.auto import trange
    except ImportError:
        return plain_progress(name, epochs)
    return trange(epochs, desc=name, leave=False)


def plain_progress(name, epochs):
    """Count epochs, and print every fifth."""
    for epoch in range(epochs):
        if epoch % 5 == 0:
            print(f"{name}: epoch {epoch + 1} of {epochs}", flush=True)
        yield epoch


def compare_with_torch(norm, h):
    """Hand the norm to torch without a copy, and tell how far the two results are apart."""
    try:
        import torch
    except ImportError:
        return "torch is not installed, so there is nothing to compare with"
    if type(h) is not np.ndarray and not torch.cuda.is_available():
        return "torch has no CUDA here, so it cannot take the norm from the GPU"
    module = norm.to_torch()
    with torch.no_grad():
        theirs = module(torch.from_dlpack(h))
    ours = torch.from_dlpack(norm(h, keep=False))
    shared = module.weight.data_ptr() == torch.from_dlpack(norm.weight).data_ptr()
    return (
        f"{module} in torch: largest difference {float((ours - theirs).abs().max()):.1e}, "
        f"memory shared: {shared}"
    )


if __name__ == "__main__":
    main()
