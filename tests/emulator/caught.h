// Calls from Python: there is no exception in plain C.
#pragma once

#include <exception>
#include <string>

// Null, or what went wrong, until the next call
template <class Call>
const char* caught(Call call) {
  static std::string message;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
