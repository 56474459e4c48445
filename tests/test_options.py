import inspect

import pytest
from panorama_vlm import PanoramaConfig
from panorama_vlm.geometry_panorama import ViewOptions
from panorama_vlm.options_panorama import check_option_names

OF_THE_CONFIG = [*ViewOptions.names(), *inspect.signature(PanoramaConfig).parameters]
MEANT = {
    "fov": "fov_deg",
    "fov_degree": "fov_deg",
    "overlap": "overlap_ratio",
    "pitch": "pitch_rows",
    "caps": "pole_caps",
    "strategy": "view_strategy",
    "veiw_strategy": "view_strategy",
    "img_size": "image_size",
}


@pytest.mark.parametrize("known", [ViewOptions.names(), OF_THE_CONFIG], ids=["views", "configuration"])
@pytest.mark.parametrize(("given", "meant"), MEANT.items())
def test_a_short_or_misspelled_name_finds_the_option_that_is_meant(given, meant, known):
    with pytest.raises(ValueError) as raised:
        check_option_names(["image_size", given], known, "PanoramaConfig")
    assert str(raised.value) == f"unknown option {given!r} of PanoramaConfig, did you mean {meant!r}?"


def test_a_name_that_the_configuration_alone_has_is_found_by_its_beginning():
    with pytest.raises(ValueError, match="'latent_dim' of X, did you mean 'latent_dimension'"):
        check_option_names(["latent_dim"], OF_THE_CONFIG, "X")


def test_where_nothing_is_close_all_options_are_listed():
    with pytest.raises(ValueError) as raised:
        check_option_names(["xyz"], ["fov_deg", "pole_caps"], "X")
    assert str(raised.value) == "unknown option 'xyz' of X; its options are fov_deg, pole_caps"


def test_every_unknown_name_is_reported_and_known_ones_pass():
    check_option_names(["pole_caps", "fov_deg"], ["fov_deg", "pole_caps"], "X")
    check_option_names([], [], "X")
    with pytest.raises(ValueError, match="'fov' of X.*\n.*'caps' of X"):
        check_option_names(iter(["fov", "caps"]), iter(["fov_deg", "pole_caps"]), "X")
