"""Contract tests for components: subclass the one of your role, give a fixture, run pytest.

    from diff2to3.testing import FeatureExtractorContract

    class TestMine(FeatureExtractorContract):
        @pytest.fixture
        def component(self):
            return MyExtractor(MyConfig(width=8))

Needs pytest (``pip install diff2to3[testing]``). Use the smallest config that has all parts: every check runs it.
"""

from diff2to3.testing._contract import ComponentContract as ComponentContract
from diff2to3.testing._drawing import MattingContract as MattingContract
from diff2to3.testing._drawing import MeshRendererContract as MeshRendererContract
from diff2to3.testing._drawing import RendererContract as RendererContract
from diff2to3.testing._models import BackboneContract as BackboneContract
from diff2to3.testing._models import FeatureExtractorContract as FeatureExtractorContract
from diff2to3.testing._models import LatentDecoderContract as LatentDecoderContract
from diff2to3.testing._models import StructureContract as StructureContract
