"""Where commands write: found out before the work starts, and said when it is done."""

import os
from pathlib import Path

from activemlp_jax.errors import UserError


def check_output(output: Path) -> None:
    """Nothing is made yet: the folders above `output` are made when it is written.

    Args:
      output: a file or folder to write.

    Raises:
      UserError: what is above it is no folder, or nothing can be written into that.
    """
    there = next(place for place in output.parents if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{output} cannot be written: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{output} cannot be written: there is no permission to write in {there}")


def check_output_file(output: Path) -> str:
    """As `check_output`, for a file, which may be there already.

    Args:
      output: the file to write.

    Returns:
      What is to be done to it: 'wrote', or 'replaced' where it is there.

    Raises:
      UserError: also where it is a folder.
    """
    if output.is_dir():
        raise UserError(f"{output} cannot be written: it is a folder")
    check_output(output)
    return "replaced" if output.exists() else "wrote"
