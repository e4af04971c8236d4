// Nothing of it is used by the sources that are compiled here.
#pragma once
