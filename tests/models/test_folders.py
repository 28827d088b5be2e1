from pathlib import Path

import pytest

from smelt.errors import NotFound, UnsupportedModel
from smelt.models.folders import read_config


def test_read_config_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=str(tmp_path)):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UnsupportedModel, match="must hold an object"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(UnsupportedModel, match=rf"{tmp_path}.*bloom"):
        read_config(tmp_path)
