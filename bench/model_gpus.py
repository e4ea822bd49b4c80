"""The GPUs that the cost model knows: data-sheet numbers, what of them is reached, and the sources.

A number without a published source is an assumption and says so; a run of `make gpu` replaces it.
"""

from dataclasses import dataclass

from cupynorm._cuda.plan import Device

__all__ = ["GPUS", "Gpu", "gpu_named"]

KIB, MIB = 1024, 2**20
COPY_READS = 0.5  # of the bytes of a copy
# DeviceTransform's bytes in flight are what saturates the memory: four times what Little's law asks
# for, with which 1 - exp(-4) = 98 % of the bandwidth flow.
IN_FLIGHT_MARGIN = 4.0


@dataclass(frozen=True)
class Gpu:
    """One GPU; `sources` says where each number that is no data-sheet value comes from."""

    name: str
    compute_capability: int
    sm_count: int
    bandwidth: float  # GB/s, data sheet
    achievable: float  # of it, by the best streaming kernel
    l2_bytes: int
    clock: float  # GHz, boost
    lanes: int  # instructions of lanes that a multiprocessor starts per cycle
    in_flight: int  # bytes per multiprocessor that saturate the memory
    t0: float  # microseconds: launch, fill and drain of a kernel that streams
    shared_per_block: int
    shared_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int
    sources: tuple[str, str, str]  # of achievable, in_flight, t0

    @property
    def device(self) -> Device:
        """What a plan is chosen for."""
        return Device(self.compute_capability, self.sm_count, self.shared_per_block)

    @property
    def supply(self) -> float:
        """Bytes per microsecond that the memory gives."""
        return self.bandwidth * self.achievable * 1e3

    @property
    def latency(self) -> float:
        """Microseconds from a load to its data on an idle memory, by Little's law."""
        reads = self.supply * COPY_READS / self.sm_count
        return self.in_flight / IN_FLIGHT_MARGIN / reads


_BEST = "best kernel published: "
_ASSUMED = "assumed"
_TRANSFORM = "cub::DeviceTransform"
_AS_A100 = "assumed: A100's latency"

# Threads, blocks and shared memory per multiprocessor: CUDA C++ Programming Guide, technical
# specifications per compute capability. Bandwidth, multiprocessors, L2 and clock: NVIDIA's data
# sheets and architecture papers.
_SM80 = (163 * KIB, 164 * KIB, 2048, 32)
_SM89 = (99 * KIB, 100 * KIB, 1536, 24)
_SM90 = (227 * KIB, 228 * KIB, 2048, 32)
_SM120 = (99 * KIB, 100 * KIB, 1536, 32)

GPUS = (
    # 64 lanes of float32 of which two thirds of the instructions are.
    Gpu("A100", 80, 108, 2039, 0.88, 40 * MIB, 1.41, 96, 16 * KIB, 7.0, *_SM80,
        (f"{_ASSUMED}; Apex's FastLayerNorm reaches 0.81", _TRANSFORM, _ASSUMED)),
    Gpu("L4", 89, 58, 300, 0.90, 48 * MIB, 2.04, 128, 6 * KIB, 7.0, *_SM89,
        (_ASSUMED, _AS_A100, _ASSUMED)),
    Gpu("L40S", 89, 142, 864, 0.90, 96 * MIB, 2.52, 128, 6 * KIB, 7.0, *_SM89,
        (_ASSUMED, _AS_A100, _ASSUMED)),
    Gpu("RTX 4090", 89, 128, 1008, 0.90, 72 * MIB, 2.52, 128, 8 * KIB, 7.0, *_SM89,
        (_ASSUMED, _AS_A100, _ASSUMED)),
    Gpu("H100", 90, 132, 3350, 0.90, 50 * MIB, 1.98, 128, 32 * KIB, 7.3, *_SM90,
        (f"{_BEST}Quack's RMSNorm, 3020 GB/s", _TRANSFORM,
         "mean of five fits to Quack's times, N = 256 to 4096")),
    Gpu("H200", 90, 132, 4800, 0.87, 50 * MIB, 1.98, 128, 48 * KIB, 7.3, *_SM90,
        (f"{_BEST}torch.compile's RMSNorm, 4176 GB/s", _TRANSFORM, f"{_ASSUMED}, as H100")),
    Gpu("B200", 100, 148, 8000, 0.89, 126 * MIB, 1.96, 128, 64 * KIB, 9.6, *_SM90,
        ("triad on a GB300, 7140 GB/s", _TRANSFORM, "mean of six fits to oink's times, GB300")),
    Gpu("RTX 5090", 120, 170, 1792, 0.86, 96 * MIB, 2.41, 128, 10 * KIB, 7.0, *_SM120,
        (f"{_BEST}Quack's RMSNorm, 1539 GB/s", _AS_A100, _ASSUMED)),
)  # fmt: skip


def gpu_named(name: str) -> Gpu | None:
    """The GPU of a name as the driver gives it, "NVIDIA H100 80GB HBM3" say; None if none fits."""
    words = name.replace("-", " ").split()
    found = [g for g in GPUS if all(word in words for word in g.name.split())]
    return max(found, key=lambda g: len(g.name), default=None)
