"""The list of faults follows the code: otherwise `make faults` could not put them in."""

from faults import FAULTS, ROOT, read_faults


def test_the_text_of_every_fault_occurs_once() -> None:
    for fault in read_faults(FAULTS):
        assert (ROOT / fault.file).read_text().count(fault.right) == 1, fault
        for tests in fault.tests.split():
            assert (ROOT / "tests" / tests.split("::")[0]).exists(), fault
