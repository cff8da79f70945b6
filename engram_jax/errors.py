"""The one error that speaks to users."""


class InputError(ValueError):
    """What the user gave cannot work; the message names the thing and the remedy.

    Entry points print the message alone and leave with status 2. Anything else that is raised is a
    bug and keeps its traceback.
    """
