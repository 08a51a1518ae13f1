"""Root may read and write everything; a process that tests permissions gives that up first."""

import ctypes
import os


def give_up_root():
    """Drop this process's capabilities; permission bits then hold for root too, as for any owner of a file.

    Another user id would do as well for the files, but could not read a Python that is installed in root's home.
    """
    if os.getuid() != 0:
        return
    version_3 = 0x20080522
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    none = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")
