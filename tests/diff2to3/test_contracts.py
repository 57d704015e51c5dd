"""Our own components keep the contracts that `diff2to3.testing` ships for everybody's."""

import pytest
from diff2to3 import Pipeline
from diff2to3._matting import BorderMatting, BorderMattingConfig
from diff2to3.testing import (
    BackboneContract,
    FeatureExtractorContract,
    LatentDecoderContract,
    MattingContract,
    MeshRendererContract,
    RendererContract,
    StructureContract,
)
from gs_render import CpuRenderer, RendererConfig, TorchRenderer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline(micro_pipeline):
    return Pipeline.from_pretrained(micro_pipeline, device="cpu")


class TestFluxFeatures(FeatureExtractorContract):
    @pytest.fixture
    def component(self, pipeline):
        return pipeline.feature_extractor


class TestStructureFlow(StructureContract):
    @pytest.fixture
    def component(self, pipeline):
        return pipeline.structure


class TestSMDiT(BackboneContract):
    @pytest.fixture
    def component(self, pipeline):
        return pipeline.backbone


class TestGaussianDecoder(LatentDecoderContract):
    @pytest.fixture
    def component(self, pipeline):
        return pipeline.latent_decoder


class TestBorderMatting(MattingContract):
    @pytest.fixture
    def component(self):
        return BorderMatting(BorderMattingConfig())


class TestCpuRenderer(RendererContract):
    @pytest.fixture
    def component(self):
        return CpuRenderer(RendererConfig(filter_2d=0.1, antialias=True))


class TestTorchRenderer(RendererContract):
    @pytest.fixture
    def component(self):
        return TorchRenderer(RendererConfig())


class TestMeshRenderers(MeshRendererContract):
    @pytest.fixture(params=["gl", "cpu"])
    def component(self, request, mesh_renderer):
        return mesh_renderer(request.param)
