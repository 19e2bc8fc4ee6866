"""The Hugging Face Hub, and ModelScope: models and datasets by id in place of folders, and uploads."""

from jvlm.hub.downloads import download
from jvlm.hub.ids import HubId, is_hub_id
from jvlm.hub.uploads import UploadReport, upload

__all__ = ["HubId", "UploadReport", "download", "is_hub_id", "upload"]
