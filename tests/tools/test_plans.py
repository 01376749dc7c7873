"""Plans in print."""

from llama_tut.tools.plans import Plan, short


def test_a_plan_in_print():
    assert [short(x) for x in (0.0123, 1234567.0)] == ["0.0123", "1,234,567"]
    numbers = dict(size=1e9, tokens=2e10, flops=1.2e20, hours=2, cost=None)
    plan = Plan(**numbers, device_hours=16, state_bytes=16e9, least_devices=1)
    assert "1B parameters, 20B tokens" in str(plan)
    assert "cost" not in str(plan) and "16 GB of state" in str(plan)
