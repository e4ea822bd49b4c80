"""K4's candidates in `bench/`: each has a plan that a device can launch, none before sm_90."""

import itertools

import pytest

from bench import gpu_tune, gpu_tune_backward, gpu_tune_cluster
from bench.gpu_backward import gradient_layout
from cupynorm._cuda.plan import Device
from cupynorm._layout import layout_of
from tests.simt.limits import DeviceLimits
from tests.test_plan import SM90, device_of

TRIALS = (gpu_tune_cluster.cluster_trials, gpu_tune_cluster.cluster_bwd_trials)


@pytest.mark.parametrize("trials", TRIALS)
def test_no_candidates_before_sm_90(trials):
    assert list(trials(device_of("89"))) == []
    names = [trial.name for trial in trials(SM90)]
    assert len(set(names)) == len(names) > 20


def plans_of(case, candidates, device):
    if candidates and isinstance(candidates[0], gpu_tune_backward.Candidate):
        problem = gradient_layout(case).problem
        return [gpu_tune_backward.plan_of(c, problem, device) for c in candidates]
    shape, strides = (case.rows, case.N), (case.pitch, 1)
    affine = case.affine_dtype
    layout = layout_of(shape, (1,), strides, strides, (case.dtype, affine, affine), False)
    return [gpu_tune.plan_of(c, layout.problem, device) for c in candidates]


@pytest.mark.parametrize("device", [SM90, device_of("120", 170)], ids=["sm_90", "sm_120"])
@pytest.mark.parametrize("trials", TRIALS)
def test_every_candidate_has_a_plan(trials, device):
    """Each of another geometry; what fits the device's shared memory can be launched."""
    limits = DeviceLimits.of(str(device.compute_capability))
    for trial in trials(device):
        kind = gpu_tune_backward.BACKWARD if "backward" in trial.name else gpu_tune.FORWARD
        labels = [kind.label(c) for c in trial.candidates]
        assert len(set(labels)) == len(labels) > 1
        (case,) = trial.cases
        plans = plans_of(case, trial.candidates, device)
        fitting = [p for p in plans if p.stages[0].shared_bytes <= device.shared_bytes]
        assert any(p.family in ("cluster", "split") for p in fitting), trial.name
        for stage in itertools.chain.from_iterable(p.stages for p in fitting):
            args = (stage.grid, stage.block, stage.shared_bytes, 0, stage.shared_bytes, None)
            assert not limits.refuse(*args, (stage.cluster, 1, 1)), (trial.name, stage.name)


def test_todays_choice_is_the_first_candidate():
    """Where the rows are many."""
    device = Device(90, 132, 227 * 1024)
    for trials, choose in zip(TRIALS, (forward_choice, backward_choice), strict=True):
        for trial in trials(device):
            if trial.name.startswith("cluster"):
                (case,) = trial.cases
                first = plans_of(case, trial.candidates[:1], device)[0]
                assert first == choose(case, device), trial.name


def forward_choice(case, device):
    from cupynorm._cuda.plan import choose_plan

    affine = case.affine_dtype
    strides = (case.pitch, 1)
    dtypes = (case.dtype, affine, affine)
    layout = layout_of((case.rows, case.N), (1,), strides, strides, dtypes, False)
    return choose_plan(layout.problem, device)


def backward_choice(case, device):
    from cupynorm._cuda.plan_bwd import choose_plan_bwd

    return choose_plan_bwd(gradient_layout(case).problem, device)


def test_a_cluster_is_written_as_its_table_has_it():
    row = gpu_tune_cluster.candidates(gpu_tune_cluster.CLUSTER_TABLE[0])[1]
    assert gpu_tune.written(row, "x.csv").startswith("`ClusterRow(2, 8, 4, 256, 2")
    assert gpu_tune.label(row) == "cluster/2x256/b2"
    row = gpu_tune_cluster.CLUSTER_BWD_TABLE[2]
    candidate = gpu_tune_backward.Candidate(row)
    assert gpu_tune_backward.label(candidate) == "cluster/8x512/v4+/p4"
    assert gpu_tune_backward.written(candidate, "x.csv").startswith("`ClusterBwdRow(8, 512, 1, ")
