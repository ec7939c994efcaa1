"""The disks of the tests stand in for every operation of the real one."""

from sftcli.storage import Disk
from tests.support.faulty_disk import CountingDisk


def test_every_operation_that_changes_a_disk_can_be_failed():
    operations = {name for name in vars(Disk) if not name.startswith("_")}
    assert operations == {name for name in vars(CountingDisk) if name in operations}
    assert len(operations) >= 13
