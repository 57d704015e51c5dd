"""3D Gaussian splatting in Python: Gaussians, cameras, differentiable rendering, file formats, viewers."""

from gs_render._camera import Camera as Camera
from gs_render._commands import convert as convert
from gs_render._commands import describe as describe
from gs_render._commands import view as view
from gs_render._components import AutoRenderer as AutoRenderer
from gs_render._components import CpuRenderer as CpuRenderer
from gs_render._components import GsplatRenderer as GsplatRenderer
from gs_render._components import RendererConfig as RendererConfig
from gs_render._components import TorchRenderer as TorchRenderer
from gs_render._formats._registry import FORMATS as FORMATS
from gs_render._formats._registry import Format as Format
from gs_render._formats._registry import LossWarning as LossWarning
from gs_render._formats._registry import load as load
from gs_render._formats._registry import save as save
from gs_render._gaussians import Gaussians as Gaussians
from gs_render._mesh import Mesh as Mesh
from gs_render._mesh import extract_mesh as extract_mesh
from gs_render._pictures import contact_sheet as contact_sheet
from gs_render._pictures import framing as framing
from gs_render._pictures import save_video as save_video
from gs_render._pictures import turntable_cameras as turntable_cameras
from gs_render._render import RenderOutput as RenderOutput
from gs_render._render import backend_report as backend_report
from gs_render._render import backend_status as backend_status
from gs_render._render import render as render
from gs_render._render import render_batch as render_batch
from gs_render._render import use_backend as use_backend

__version__ = "0.1.0"
