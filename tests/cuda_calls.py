"""What calls on CuPy's stand-in cost."""


class Spent:
    """What a block of code launched, compiled and allocated."""

    def __init__(self, cp):
        self._sim = cp.simulator

    def __enter__(self):
        self._before = (len(self._sim.compilations), self._sim.allocations)
        self._launched = len(self._sim.launches)
        return self

    def __exit__(self, *_):
        self.launches = self._sim.launches[self._launched :]
        self.names = [launch.name for launch in self.launches]
        after = (len(self._sim.compilations), self._sim.allocations)
        self.compilations, self.allocations = (
            b - a for a, b in zip(self._before, after, strict=True)
        )
