"""OpenVINO's binding, as it is after many grammars already after two."""

import os
from pathlib import Path

from backends import OpenVino


class Wearing(OpenVino):
    GRAMMARS = 2

    def renew(self):
        super().renew()
        with Path(os.environ["RENEWED"]).open("a") as told:
            told.write("x")
