"""A short soak: the memory of many steps is flat, and bf16 weights end where fp32 weights do."""

import pytest
import soak

KILOBYTE = 1024
STEPS = 3000


@pytest.mark.slow
@pytest.mark.parametrize("arm", soak.ARMS)
def test_memory_is_flat_over_many_steps(arm):
    run = soak.soak(arm, STEPS, seed=0)
    assert run["bytes_a_step"] < KILOBYTE
    assert run["loss"] < 0.1
    assert run["seconds"][-1] < 3 * run["seconds"][1]  # the processor's, on a machine that others use


def test_a_record_is_gone_on_with_and_its_table_has_every_arm(tmp_path, capsys):
    out = tmp_path / "soak.json"
    soak.main(steps=60, seeds=(0,), out=out)
    first = out.read_text()
    soak.main(steps=60, seeds=(0,), out=out)
    assert out.read_text() == first
    table = capsys.readouterr().out
    assert all(arm in table for arm in soak.ARMS)
