"""What calls on CuPy's stand-in cost."""


class Spent:
    """What a block of code launched, compiled, allocated, and how often it waited."""

    def __init__(self, cp):
        self._sim = cp.simulator

    def __enter__(self):
        self._before = self._counts()
        self._launched = len(self._sim.launches)
        return self

    def __exit__(self, *_):
        self.launches = self._sim.launches[self._launched :]
        self.names = [launch.name for launch in self.launches]
        self.compilations, self.allocations, self.synchronizations = (
            b - a for a, b in zip(self._before, self._counts(), strict=True)
        )

    def _counts(self):
        sim = self._sim
        return len(sim.compilations), sim.allocations, sim.synchronizations


def capability_for(request):
    """The stand-in's capability: sm_90, but sm_80 for a test of a family that clusters replace."""
    callspec = getattr(request.node, "callspec", None)
    family = callspec.params.get("family") if callspec else None
    return "80" if family in ("shared", "split") else "90"
