"""The contract of a feature extractor, as diff2to3 checks its own."""

import pytest
from acme_features import DctFeatures, DctFeaturesConfig
from diff2to3.testing import FeatureExtractorContract


class TestDctFeatures(FeatureExtractorContract):
    @pytest.fixture
    def component(self):
        return DctFeatures(DctFeaturesConfig(image_size=32))
