"""The contract of a backbone, as diff2to3 checks its own."""

import pytest
from acme_flow import DeepSetFlow, DeepSetFlowConfig
from diff2to3.testing import BackboneContract


class TestDeepSetFlow(BackboneContract):
    @pytest.fixture
    def component(self):
        return DeepSetFlow(DeepSetFlowConfig(grid_size=8, condition_channels=12, width=16, depth=2))
