// What reader.cpp, which must not see torch's stable headers, gives to the rest of the library.
#pragma once

namespace fastsam {

// torch's current CUDA stream on a device, a captured one too; false if torch gives none.
bool work_stream(int device, void** stream);

}  // namespace fastsam
